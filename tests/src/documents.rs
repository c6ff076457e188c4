//! The files of the project's documentation.

use std::path::{Path, PathBuf};

use crate::project;

/// A code block of a page that a test runs: its name, the heading above, and its place below the heading.
pub type Step = (&'static str, &'static str, usize);

/// A file of the project.
pub fn text(path: &str) -> String {
    std::fs::read_to_string(project().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The files of a folder of the project, with those of its subfolders.
pub fn files_below(folder: &str) -> Vec<PathBuf> {
    let (mut files, mut folders) = (Vec::new(), vec![project().join(folder)]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("a folder of the project") {
            let path = entry.expect("its entry").path();
            match path.is_dir() {
                true => folders.push(path),
                false => files.push(path),
            }
        }
    }
    files
}

/// The pages of a folder of the project.
pub fn pages_below(folder: &str) -> Vec<PathBuf> {
    files_below(folder).into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "md")).collect()
}

/// The code blocks of a page that are in a language, without the indentation of a list around them.
pub fn blocks(page: &str, language: &str) -> Vec<String> {
    let (mut found, mut open) = (Vec::new(), None::<(usize, bool, String)>);
    for line in page.lines() {
        let code = line.trim_start();
        match (&mut open, code.strip_prefix("```")) {
            (None, Some(name)) => open = Some((line.len() - code.len(), name == language, String::new())),
            (Some((_, is_wanted, block)), Some(_)) => {
                if *is_wanted {
                    found.push(std::mem::take(block));
                }
                open = None;
            }
            (Some((indent, _, block)), None) => {
                *block += line.get(*indent..).unwrap_or_default();
                block.push('\n');
            }
            (None, None) => {}
        }
    }
    found
}

/// Writes shell blocks of a page into files that have the names of the steps.
pub fn write_steps(page: &str, steps: &[Step], folder: &Path) {
    let page = text(page);
    for (name, heading, nth) in steps {
        let below =
            page.split_once(&format!("{heading}\n")).unwrap_or_else(|| panic!("{heading} is not in the page")).1;
        std::fs::write(folder.join(name), blocks(below, "sh").swap_remove(*nth)).expect("written");
    }
}
