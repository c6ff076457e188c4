//! The files for services that run the project's commands: GitHub Actions, GitLab, Dependabot.

use std::process::Command;

use dray_tests::documents::{files_below, text};
use dray_tests::process::run;
use dray_tests::{project, tool};

#[test]
fn workflows_of_github_are_valid() {
    run(Command::new(tool("actionlint")).args(files_below(".github/workflows")));
}

#[test]
fn files_fit_their_schemas() {
    let forms = [".github/ISSUE_TEMPLATE/bug.yml", ".github/ISSUE_TEMPLATE/feature.yml"];
    let cases = [
        ("gitlab-ci", &[".gitlab-ci.yml"] as &[_]),
        ("dependabot", &[".github/dependabot.yml"]),
        ("github-issue-forms", &forms),
        ("github-issue-config", &[".github/ISSUE_TEMPLATE/config.yml"]),
    ];
    for (schema, files) in cases {
        let mut command = Command::new("python3");
        command.args(["-m", "check_jsonschema", "--builtin-schema", &format!("vendor.{schema}")]);
        run(command.args(files).env("PYTHONPATH", tool("python")).current_dir(project()));
    }
}

#[test]
fn commands_are_targets_of_the_makefile() {
    let makefile = text("Makefile");
    let files = [".github/workflows/ci.yml", ".github/workflows/release.yml", ".gitlab-ci.yml"];
    let all = files.map(text).concat();
    let called: Vec<&str> = all.split("make ").skip(1).filter_map(|rest| rest.split([' ', '\n']).next()).collect();
    for wanted in ["lint", "check", "test", "bench", "release", "publish"] {
        assert!(called.contains(&wanted), "no workflow runs make {wanted}");
    }
    for name in called {
        assert!(makefile.contains(&format!("\n{name}:")), "make {name}");
    }
}
