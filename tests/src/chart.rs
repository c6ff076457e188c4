//! The Helm chart, rendered by `helm template`.

use std::path::PathBuf;
use std::process::Command;

use serde::Deserialize;
pub use serde_yaml_ng::Value;

use crate::process::output;

/// The directory of the chart, the manifests and the monitoring rules.
pub fn k8s_dir() -> PathBuf {
    crate::project().join("k8s")
}

/// Renders the chart with these arguments, hooks included. Err: helm's error output.
pub fn render(arguments: &[&str]) -> Result<String, String> {
    let mut command = Command::new(crate::tool("helm"));
    command.args(["template", "dray"]).arg(k8s_dir().join("dray"));
    // Without a cluster, helm needs the Kubernetes version as an argument.
    command.args(["--namespace", "dray", "--kube-version", "1.37.0"]).args(arguments);
    let output = output(&mut command);
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    Ok(String::from_utf8(output.stdout).expect("helm writes UTF-8"))
}

/// The documents of a YAML text.
pub fn documents(text: &str) -> Vec<Value> {
    let parsed = serde_yaml_ng::Deserializer::from_str(text);
    let documents = parsed.map(|document| Value::deserialize(document).expect("valid YAML"));
    documents.filter(|document| !document.is_null()).collect()
}

/// The documents of one kind.
pub fn of_kind<'a>(documents: &'a [Value], kind: &str) -> Vec<&'a Value> {
    documents.iter().filter(|document| document["kind"] == kind).collect()
}

/// The strings of a list.
pub fn texts(list: &Value) -> Vec<&str> {
    list.as_sequence().into_iter().flatten().filter_map(Value::as_str).collect()
}
