//! The plain manifests fit together: what a Service selects exists, what dray is told it understands.

use std::process::Command;

use dray_tests::dray::binary;
use dray_tests::process::output;
use serde::Deserialize;
use serde_yaml_ng::Value;

fn documents(file: &str) -> Vec<Value> {
    let path = format!("{}/../k8s/{file}", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(path).unwrap();
    serde_yaml_ng::Deserializer::from_str(&text).map(|document| Value::deserialize(document).unwrap()).collect()
}

fn of_kind<'a>(documents: &'a [Value], kind: &str) -> Vec<&'a Value> {
    documents.iter().filter(|document| document["kind"] == kind).collect()
}

fn check(file: &str, workload: &str) {
    let documents = documents(file);
    let workload = of_kind(&documents, workload)[0];
    let pod = &workload["spec"]["template"];
    let labels = &pod["metadata"]["labels"];
    assert_eq!(&workload["spec"]["selector"]["matchLabels"], labels);
    let services = of_kind(&documents, "Service");
    assert!(services.iter().all(|service| &service["spec"]["selector"] == labels));
    let headless = services.iter().find(|service| service["spec"]["clusterIP"] == "None").unwrap();
    assert_eq!(headless["spec"]["publishNotReadyAddresses"], true);

    let config = of_kind(&documents, "ConfigMap")[0]["data"]["dray.toml"].as_str().unwrap();
    let name = headless["metadata"]["name"].as_str().unwrap();
    assert!(config.contains(&format!("service = \"{name}.dray.svc.cluster.local\"")));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("dray.toml");
    std::fs::write(&path, config).unwrap();
    let checked = output(Command::new(binary()).arg("check-config").arg(&path));
    assert!(checked.status.success(), "{file}: {}", String::from_utf8_lossy(&checked.stderr));

    let container = &pod["spec"]["containers"][0];
    let security = &container["securityContext"];
    assert_eq!(security["readOnlyRootFilesystem"], true);
    assert_eq!(security["allowPrivilegeEscalation"], false);
    assert_eq!(security["capabilities"]["drop"][0], "ALL");
    assert_eq!(pod["spec"]["automountServiceAccountToken"], false);
    // Every flag that the container is started with exists.
    let help = output(Command::new(binary()).arg("--help"));
    let help = String::from_utf8_lossy(&help.stdout).into_owned();
    for flag in container["args"].as_sequence().unwrap().iter().filter_map(Value::as_str) {
        assert!(!flag.starts_with("--") || help.contains(flag), "{flag}");
    }
}

/// A variable in the image would override the file of whoever runs it.
#[test]
fn the_image_sets_no_variables() {
    let dockerfile = std::fs::read_to_string(format!("{}/../k8s/Dockerfile", env!("CARGO_MANIFEST_DIR"))).unwrap();
    assert!(dockerfile.contains("ENTRYPOINT") && !dockerfile.lines().any(|line| line.starts_with("ENV")));
}

#[test]
fn the_daemonset() {
    check("daemonset.yaml", "DaemonSet");
}

#[test]
fn the_deployment() {
    check("deployment.yaml", "Deployment");
}
