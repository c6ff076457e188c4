//! The reference pages of the book are generated from what they describe: the sample of the configuration, the values of the
//! chart, and `--help`. `make reference` writes them; these tests find stale ones.

use std::path::{Path, PathBuf};
use std::process::Command;

use dray_tests::dray::binary;
use dray_tests::process::output;

fn project() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn text(path: &str) -> String {
    std::fs::read_to_string(project().join(path)).unwrap()
}

/// Holds a generated page against the one in the book, or writes it.
fn assert_current(page: &str, generated: &str) {
    let path = project().join("docs/reference").join(page);
    if std::env::var_os("DRAY_WRITE_REFERENCE").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, generated).unwrap();
    }
    let current = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(current == generated, "docs/reference/{page} is stale: make reference");
}

/// A key, its default as written, and the comment before it.
struct Entry {
    key: String,
    default: Option<String>,
    comment: Vec<String>,
}

/// Comments as Markdown: indented lines are examples.
fn markdown(comment: &[String]) -> String {
    let mut text = String::new();
    let mut is_example = false;
    for line in comment {
        let indented = line.starts_with(' ');
        if indented != is_example {
            text += if is_example { "```\n\n" } else { "\n```text\n" };
        }
        is_example = indented;
        text += line.trim_end();
        text.push('\n');
    }
    if is_example { text + "```\n" } else { text }
}

fn section(entry: &Entry, more: &str) -> String {
    let default = match &entry.default {
        Some(default) => format!("Default: `{default}`."),
        None => "No default.".to_owned(),
    };
    let description = markdown(&entry.comment);
    let space = if description.is_empty() { "" } else { "\n" };
    format!("\n### `{}`\n\n{default}{more}\n{space}{description}", entry.key)
}

/// The keys that a reload does not apply.
fn restart_keys() -> Vec<String> {
    let code = text("proxy/src/server/reload.rs");
    let keys = code.lines().filter_map(|line| line.trim().strip_prefix("(\"")?.split_once("\", |a, b|"));
    keys.map(|(key, _)| key.to_owned()).collect()
}

#[test]
fn configuration_reference_is_current() {
    let restart = restart_keys();
    assert!(restart.len() > 8, "{restart:?}");
    let sample = text("config/dray.toml");
    let (head, _) = sample.split_once("\n\n").unwrap();
    let head: Vec<String> = head.lines().map(|line| line.trim_start_matches("# ").to_owned()).collect();
    let mut page = format!("# Configuration\n\nGenerated from `config/dray.toml`.\n\n{}", markdown(&head));
    let (mut table, mut comment, mut keys) = (String::new(), Vec::<String>::new(), 0);
    for line in sample.lines().skip(head.len()) {
        let (code, is_example) = line.strip_prefix("#: ").map_or((line, false), |code| (code, true));
        let name = code.strip_prefix('[').map(|rest| rest.trim_matches(['[', ']']).to_owned());
        if let Some(name) = name {
            let about = markdown(&comment);
            let space = if about.is_empty() { "" } else { "\n" };
            page += &format!("\n## `{code}`\n{space}{about}");
            (table, comment) = (format!("{name}."), Vec::new());
        } else if let Some((key, value)) = code.split_once(" = ").filter(|_| is_example || !code.starts_with('#')) {
            let key = format!("{table}{key}");
            let needs_restart = restart.iter().any(|known| *known == key || key.starts_with(&format!("{known}.")));
            let default = (!is_example).then(|| value.to_owned());
            let mut more = if is_example { format!(" Example: `{value}`.") } else { String::new() };
            if needs_restart {
                more += " A change needs a restart.";
            }
            page += &section(&Entry { key, default, comment: std::mem::take(&mut comment) }, &more);
            keys += 1;
        } else if let Some(line) = line.strip_prefix('#') {
            comment.push(line.strip_prefix(' ').unwrap_or(line).to_owned());
        } else {
            comment.clear();
        }
    }
    assert!(keys > 50, "{keys} keys");
    assert_current("configuration.md", &page);
}

#[test]
fn chart_values_reference_is_current() {
    let values = text("k8s/dray/values.yaml");
    let mut page = "# Chart values\n\nGenerated from `k8s/dray/values.yaml`.\n".to_owned();
    let (mut path, mut comment, mut keys) = (Vec::<String>::new(), Vec::<String>::new(), 0);
    for line in values.lines().skip(1) {
        let depth = (line.len() - line.trim_start().len()) / 2;
        let line = line.trim_start();
        if let Some(line) = line.strip_prefix('#') {
            comment.push(line.strip_prefix(' ').unwrap_or(line).to_owned());
        } else if let Some((key, value)) = line.split_once(':') {
            path.truncate(depth);
            path.push(key.to_owned());
            let comment = std::mem::take(&mut comment);
            let entry = Entry { key: path.join("."), default: Some(value.trim().to_owned()), comment };
            if value.is_empty() {
                let about = markdown(&entry.comment);
                let space = if about.is_empty() { "" } else { "\n" };
                page += &format!("\n## `{}`\n{space}{about}", entry.key);
            } else {
                page += &section(&entry, "");
                keys += 1;
            }
        } else {
            comment.clear();
        }
    }
    assert!(keys > 50, "{keys} values");
    assert_current("chart-values.md", &page);
}

/// The help of a command and of all commands below it.
fn help(command: &[&str], page: &mut String) {
    let output = output(Command::new(binary()).args(command).arg("--help").env_clear());
    assert!(output.status.success(), "{command:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let name = [&["dray"], command].concat().join(" ");
    let lines: Vec<&str> = text.trim().lines().map(str::trim_end).collect();
    *page += &format!("\n## `{name}`\n\n```text\n{}\n```\n", lines.join("\n"));
    let commands = text.split("\nCommands:\n").nth(1).unwrap_or_default().lines().take_while(|line| !line.is_empty());
    let names = commands
        .filter_map(|line| line.strip_prefix("  ")?.split_whitespace().next().filter(|_| !line.starts_with("   ")));
    for name in names.filter(|name| *name != "help") {
        help(&[command, &[name]].concat(), page);
    }
}

#[test]
fn command_line_reference_is_current() {
    let mut page = "# Command line\n\nGenerated from `dray --help`.\n".to_owned();
    help(&[], &mut page);
    assert!(page.matches("\n## ").count() > 8, "{page}");
    assert_current("cli.md", &page);
}

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

/// The files of a folder of the project, with those of its subfolders.
fn files_below(folder: &str) -> Vec<PathBuf> {
    let (mut files, mut folders) = (Vec::new(), vec![project().join(folder)]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => files.push(path),
            }
        }
    }
    files
}

fn pages_below(folder: &str) -> Vec<PathBuf> {
    files_below(folder).into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "md")).collect()
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
    let mut pages: Vec<PathBuf> = vec![project().join("README.md")];
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
        for target in prose.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target) {
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
