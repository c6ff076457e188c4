//! The documentation: its links, figures, pictures, sentences, log events, and the examples that people copy.

use std::collections::BTreeMap;
use std::process::Command;

use dray_tests::documents::{blocks, files_below, pages_below, text};
use dray_tests::dray::binary;
use dray_tests::process::{output, run};
use dray_tests::project;

/// Level and text of every event in a source file. Debug events are not part of the contract.
fn events(code: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("tracing::") {
        let rest = &code[at + "tracing::".len()..];
        let Some(level) = ["error", "warn", "info"].into_iter().find(|level| rest.starts_with(&format!("{level}!(")))
        else {
            continue;
        };
        // The text is the last literal inside the parentheses of the macro.
        let (mut depth, mut literals, mut literal) = (0, Vec::new(), None::<usize>);
        for (place, c) in rest.char_indices().skip(level.len() + 1) {
            match (c, literal) {
                ('"', Some(start)) if !rest[..place].ends_with('\\') => {
                    literals.push(&rest[start..place]);
                    literal = None;
                }
                ('"', None) => literal = Some(place + 1),
                ('(', None) => depth += 1,
                (')', None) => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                break;
            }
        }
        let text: Vec<&str> = literals.pop().unwrap().split("\\\n").map(str::trim_start).collect();
        found.push((level.to_owned(), text.concat()));
    }
    found
}

#[test]
fn log_events_are_documented_with_their_level() {
    let mut logged = Vec::new();
    for path in files_below("proxy/src") {
        logged.extend(events(&std::fs::read_to_string(path).unwrap_or_default()));
    }
    assert!(logged.len() > 60, "{} events", logged.len());
    let page = text("docs/operations/troubleshooting.md");
    let section = page.split("## Log events").nth(1).unwrap().split("\n## ").next().unwrap();
    let rows: Vec<Vec<&str>> =
        section.lines().map(|line| line.split(" | ").collect()).filter(|row: &Vec<_>| row.len() > 2).collect();
    let documented = |level: &str, event: &str| {
        // A long text is documented by its beginning.
        rows.iter()
            .any(|row| row[1] == level && row[0].split('`').skip(1).step_by(2).any(|text| event.starts_with(text)))
    };
    for (level, event) in &logged {
        assert!(documented(level, event), "{level} event \"{event}\" is not in docs/operations/troubleshooting.md");
    }
    for row in rows.iter().filter(|row| ["error", "warn", "info"].contains(&row[1])) {
        for text in row[0].split('`').skip(1).step_by(2) {
            assert!(logged.iter().any(|(_, event)| event.starts_with(text)), "no code logs \"{text}\"");
        }
    }
}

/// Every figure of the README was measured: it is in the results.
#[test]
fn readme_figures_are_in_the_results() {
    let (readme, results) = (text("README.md"), text("loadtest/RESULTS.md"));
    let figures = readme.split("## Figures").nth(1).unwrap().split("\n## ").next().unwrap();
    let rows = figures.lines().filter(|line| line.starts_with("| ")).skip(1);
    let mut count = 0;
    for row in rows {
        for cell in row.split('|').skip(2).take(2) {
            let numbers = cell.split(|c: char| !c.is_ascii_digit() && !matches!(c, '.' | ','));
            for number in
                numbers.map(|number| number.trim_matches(['.', ','])).filter(|number| number.contains(['.', ',']))
            {
                // The version of a program, in parentheses.
                let is_version = row.contains(&format!("({number})"));
                assert!(is_version || results.contains(number), "{number} of \"{row}\" is not in loadtest/RESULTS.md");
                count += 1;
            }
        }
    }
    assert!(count > 10, "{count} figures");
}

/// The sentences of a page, without code, tables and headings.
fn sentences(page: &str) -> Vec<String> {
    let mut prose = String::new();
    for (nth, block) in page.split("```").enumerate() {
        if nth % 2 == 0 {
            for line in block.lines() {
                let line = line.trim();
                let is_item = line.starts_with("- ")
                    || line.starts_with("> ")
                    || line.split_once(". ").is_some_and(|(number, _)| number.parse::<u32>().is_ok());
                match line.starts_with(['#', '|', '<', '[']) || line.is_empty() {
                    true => prose += ". ",
                    false if is_item => prose += &format!(". {line}"),
                    false => prose += &format!(" {line}"),
                }
            }
        }
    }
    prose.split(". ").flat_map(|part| part.split("? ")).map(str::to_owned).collect()
}

#[test]
fn sentences_are_short() {
    let mut pages = vec![project().join("README.md")];
    pages.extend(pages_below("docs"));
    let (mut all, mut long) = (0, 0);
    for page in
        pages.iter().filter(|page| !page.to_str().unwrap().contains("reference/") && !page.ends_with("SUMMARY.md"))
    {
        let is_strict = page.ends_with("README.md") || page.to_str().unwrap().contains("quickstart");
        for sentence in sentences(&std::fs::read_to_string(page).unwrap()) {
            let words = sentence.split_whitespace().count();
            all += 1;
            long += usize::from(words > 30);
            assert!(!is_strict || words <= 35, "{}: {words} words: {sentence}", page.display());
        }
    }
    assert!(all > 500 && long * 20 <= all, "{long} of {all} sentences have more than 30 words");
    assert!(text("README.md").lines().count() <= 150, "the README fits on three screens");
}

/// Every relative link of the documentation leads to a file, and to a heading in it.
#[test]
fn links_lead_to_pages_and_headings() {
    let mut pages =
        vec![project().join("README.md"), project().join("ARCHITECTURE.md"), project().join("CONTRIBUTING.md")];
    pages.extend(pages_below("docs"));
    let mut links = 0;
    for page in &pages {
        let text = std::fs::read_to_string(page).unwrap();
        let prose: String = text.split("```").step_by(2).collect();
        let links_of = |start: &str, end: char| -> Vec<&str> {
            prose.split(start).skip(1).filter_map(|rest| rest.split_once(end)).map(|(target, _)| target).collect()
        };
        let pictures = [links_of(" src=\"", '"'), links_of(" srcset=\"", '"')].concat();
        for target in links_of("](", ')').into_iter().chain(pictures) {
            if target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
            let file = if file.is_empty() { page.clone() } else { page.parent().unwrap().join(file) };
            assert!(file.exists(), "{}: the link to {target} leads nowhere", page.display());
            if !anchor.is_empty() {
                let linked = std::fs::read_to_string(&file).unwrap();
                let has = linked.lines().any(|line| line.starts_with('#') && anchor_of(line) == anchor)
                    || linked.contains(&format!("id=\"{anchor}\""));
                assert!(has, "{}: {target} is not a heading", page.display());
            }
            links += 1;
        }
    }
    assert!(links > 100, "{links} links");
    let summary = text("docs/SUMMARY.md");
    for page in pages.iter().filter_map(|page| page.strip_prefix(project().join("docs")).ok()) {
        let name = page.to_str().unwrap();
        assert!(name == "SUMMARY.md" || summary.contains(&format!("({name})")), "{name} is not in docs/SUMMARY.md");
    }
}

/// The anchor of a heading, as mdBook and forges make it.
fn anchor_of(heading: &str) -> String {
    let title = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = title.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn picture_of_the_pull_path_is_current() {
    let drawn = run(Command::new("python3").arg(project().join("tests/pull_path.py")));
    assert!(drawn == text("docs/images/pull-path.svg"), "docs/images/pull-path.svg is stale: make pictures");
}

/// Whether a TOML block is for containerd, podman or BuildKit.
fn is_of_another_program(block: &str) -> bool {
    block.starts_with("[host.")
        || block.contains("[plugins.")
        || block.contains("\nlocation = ")
        || block.starts_with("[registry.\"")
}

#[test]
fn documented_configurations_are_valid() {
    let dir = tempfile::tempdir().unwrap();
    let (file, mut valid, mut others) = (dir.path().join("dray.toml"), 0, 0);
    for page in examples() {
        for block in blocks(&std::fs::read_to_string(&page).unwrap(), "toml") {
            if is_of_another_program(&block) {
                block.parse::<toml::Table>().unwrap_or_else(|e| panic!("{}: {e}", page.display()));
                others += 1;
                continue;
            }
            std::fs::write(&file, &block).unwrap();
            let checked = output(Command::new(binary()).arg("check-config").arg(&file));
            let printed = String::from_utf8_lossy(&checked.stderr);
            assert!(checked.status.success(), "{}: {printed}\n{block}", page.display());
            valid += 1;
        }
    }
    assert!(valid > 20 && others > 5, "{valid} configurations of dray, {others} of other programs");
}

/// The pages with examples: generated ones are left out.
fn examples() -> Vec<std::path::PathBuf> {
    let mut pages = vec![project().join("README.md"), project().join("CONTRIBUTING.md")];
    pages.extend(pages_below("docs").into_iter().filter(|page| !page.to_str().unwrap().contains("reference/")));
    pages
}

/// The commands of a page: each part of a line of its shell blocks, and the commands inside its sentences.
fn commands(page: &str) -> Vec<Vec<String>> {
    let mut lines = Vec::new();
    for block in blocks(page, "sh") {
        lines.extend(block.replace("\\\n", " ").lines().map(str::to_owned));
    }
    let prose: String = page.split("```").step_by(2).collect();
    lines.extend(prose.split('`').skip(1).step_by(2).map(str::to_owned));
    let parts = lines.iter().flat_map(|line| line.split(['|', ';', '&', '<', '>', '(', ')', '`']));
    parts.map(|part| part.split_whitespace().map(str::to_owned).collect()).collect()
}

/// The arguments of dray, if a command runs it: itself, by sudo, or in a pod.
fn of_dray(command: &[String]) -> Option<&[String]> {
    let at = match command.iter().position(|word| word == "--") {
        Some(at) if command.get(at + 1).is_some_and(|word| word == "/dray") => at + 1,
        _ => usize::from(command.first().is_some_and(|word| word == "sudo")),
    };
    let runs_dray = command.get(at).is_some_and(|word| word == "dray" || word == "/dray");
    runs_dray.then(|| &command[at + 1..])
}

#[test]
fn documented_commands_exist() {
    let mut known = BTreeMap::<Vec<String>, Option<String>>::new();
    let mut help = |words: &[String]| -> Option<String> {
        let ask = || {
            let shown = output(Command::new(binary()).args(words).arg("--help"));
            shown.status.success().then(|| String::from_utf8(shown.stdout).unwrap())
        };
        known.entry(words.to_vec()).or_insert_with(ask).clone()
    };
    let makefile = text("Makefile");
    let (mut of_ours, mut targets) = (0, 0);
    for page in examples() {
        for command in commands(&std::fs::read_to_string(&page).unwrap()) {
            let shown = format!("{}: {}", page.display(), command.join(" "));
            if let Some(arguments) = of_dray(&command).filter(|arguments| !arguments.is_empty()) {
                let is_name =
                    |word: &String| word.chars().all(|c| c.is_ascii_lowercase() || c == '-') && !word.starts_with('-');
                let names: Vec<String> = arguments.iter().take_while(|word| is_name(word)).take(2).cloned().collect();
                // The longest name that is a command; the words after it are its arguments.
                let shortest = usize::from(!names.is_empty());
                let text = (shortest..=names.len()).rev().find_map(|count| help(&names[..count]));
                let text = text.unwrap_or_else(|| panic!("{shown}: dray has no such command"));
                for flag in arguments.iter().filter(|word| word.starts_with("--") && word.len() > 2) {
                    let flag = flag.split('=').next().unwrap();
                    let has = text.split([' ', ',', '\n', '=', '[']).any(|word| word == flag);
                    assert!(has, "{shown}: the command has no {flag}");
                }
                of_ours += 1;
            }
            if command.first().is_some_and(|word| word == "make") {
                for target in
                    command[1..].iter().take_while(|word| word.chars().all(|c| c.is_ascii_lowercase() || c == '-'))
                {
                    assert!(makefile.contains(&format!("\n{target}:")), "{shown}: the Makefile has no {target}");
                    targets += 1;
                }
            }
        }
    }
    assert!(of_ours > 100 && targets > 10, "{of_ours} commands of dray, {targets} targets");
}

#[test]
fn page_about_tests_names_every_module() {
    let (page, modules) = (text("docs/design/testing.md"), text("tests/tests/integration/main.rs"));
    let names: Vec<&str> = modules.lines().filter_map(|line| line.strip_prefix("mod ")?.strip_suffix(';')).collect();
    assert!(names.len() > 40, "{names:?}");
    for name in names {
        assert!(page.contains(&format!("`{name}`")), "{name} is in no group of docs/design/testing.md");
    }
}
