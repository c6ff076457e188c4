//! The reference pages of the book are generated from what they describe: the sample of the configuration, the values of the
//! chart, and `--help`. `make reference` writes them; these tests find stale ones.

use std::process::Command;

use dray_tests::chart::Value;
use dray_tests::documents::text;
use dray_tests::dray::binary;
use dray_tests::process::output;
use dray_tests::project;

/// Holds a generated page against the file of the project, or writes it.
fn assert_current(page: &str, generated: &str) {
    let path = project().join(page);
    if std::env::var_os("DRAY_WRITE_REFERENCE").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, generated).unwrap();
    }
    let current = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(current == generated, "{page} is stale: make reference");
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
    assert_current("docs/reference/configuration.md", &page);
}

/// What a comment of the chart's values says. A line `name: text` explains one of a value's words; indented lines continue
/// the line above.
fn sentences(comment: &[String]) -> Vec<String> {
    let mut found = Vec::<String>::new();
    for line in comment {
        let word = line.split_once(": ").filter(|(word, _)| word.chars().all(char::is_alphanumeric));
        match (word, found.last_mut()) {
            (Some((word, text)), _) => found.push(format!("- `{word}`: {text}")),
            (None, Some(last)) if line.starts_with(' ') || !last.starts_with("- ") => {
                last.push(' ');
                last.push_str(line.trim());
            }
            (None, _) => found.push(line.trim().to_owned()),
        }
    }
    found
}

/// The values of the chart. Those without a default begin a table.
fn chart_values() -> Vec<Entry> {
    let values = text("k8s/dray/values.yaml");
    let (mut path, mut comment, mut found) = (Vec::<String>::new(), Vec::<String>::new(), Vec::new());
    for line in values.lines().skip(1) {
        let depth = (line.len() - line.trim_start().len()) / 2;
        let line = line.trim_start();
        if let Some(line) = line.strip_prefix('#') {
            comment.push(line.strip_prefix(' ').unwrap_or(line).to_owned());
        } else if let Some((key, value)) = line.split_once(':') {
            path.truncate(depth);
            path.push(key.to_owned());
            let comment = sentences(&std::mem::take(&mut comment));
            let default = (!value.is_empty()).then(|| value.trim().to_owned());
            found.push(Entry { key: path.join("."), default, comment });
        } else {
            comment.clear();
        }
    }
    assert!(found.len() > 60, "{} values", found.len());
    found
}

#[test]
fn chart_values_reference_is_current() {
    let mut page = "# Chart values\n\nGenerated from `k8s/dray/values.yaml`.\n".to_owned();
    for entry in chart_values() {
        if entry.default.is_some() {
            page += &section(&entry, "");
        } else {
            let about = markdown(&entry.comment);
            let space = if about.is_empty() { "" } else { "\n" };
            page += &format!("\n## `{}`\n{space}{about}", entry.key);
        }
    }
    assert_current("docs/reference/chart-values.md", &page);
}

/// Registries of charts show this page.
#[test]
fn readme_of_the_chart_is_current() {
    let chart: Value = serde_yaml_ng::from_str(&text("k8s/dray/Chart.yaml")).unwrap();
    let mut page = format!(
        "# dray\n\n{}.\n\nThe pods use directories and, by default, the network of their nodes: where pod security is enforced, the namespace \
         needs\nthe label `pod-security.kubernetes.io/enforce=privileged`.\n\n\
         ```sh\nhelm install dray oci://REGISTRY/charts/dray --namespace dray --create-namespace --set image.repository=REGISTRY/dray\n\
         helm test dray --namespace dray\n```\n\n\
         `helm uninstall` restores the containerd of each node.\n\n## Values\n\n| Value | Default | Meaning |\n|---|---|---|\n",
        chart["description"].as_str().unwrap()
    );
    let mut about_table = String::new();
    for entry in chart_values() {
        let about: Vec<_> = entry.comment.iter().map(|line| line.trim_start_matches("- ")).collect();
        let about = about.join(" ").replace('|', "\\|");
        match entry.default {
            None => about_table = about,
            Some(default) => {
                let about = [std::mem::take(&mut about_table), about].join(" ");
                page += &format!("| `{}` | `{default}` | {} |\n", entry.key, about.trim());
            }
        }
    }
    assert_current("k8s/dray/README.md", &page);
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
    assert_current("docs/reference/cli.md", &page);
}
