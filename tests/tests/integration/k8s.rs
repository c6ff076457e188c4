//! The chart and the manifests rendered from it are consistent, and Kubernetes accepts them.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;

use dray_tests::chart::{Value, documents, k8s_dir, of_kind, render, texts};
use dray_tests::documents::{blocks, text};
use dray_tests::dray::binary;
use dray_tests::process::{output, run};
use dray_tests::tool;

/// The three latest versions with schemas.
const KUBERNETES: [&str; 3] = ["1.35", "1.36", "1.37"];

/// Values that cover every branch of the templates.
fn matrix() -> Vec<Vec<String>> {
    let sets = [
        "",
        "exposure.type=hostPort,networkPolicy.enabled=true",
        "containerd.enabled=false,serviceAccount.name=dray,metrics.tokenSecret=dray-admin",
        "containerd.configFile=/etc/containerd/config.toml,peers.keySecret=peers",
        "peers.generateKey=false",
        "metrics.enabled=true,serviceMonitor.enabled=true,prometheusRule.enabled=true,\
         grafanaDashboard.enabled=true,extraEnv[0].name=HTTPS_PROXY,extraEnv[0].value=http://proxy:3128",
        "zones.by=nodes,zones.names={a,b-1},zones.policy=isolate",
        "zones.by=podLabel,zones.names={a,b}",
        "mode=deployment",
        "mode=deployment,exposure.type=clusterIP,exposure.clusterIP=10.96.0.50,imagePullSecrets[0].name=robot",
        "mode=deployment,cache.volume.storage=200Gi,cache.volume.storageClassName=fast,cache.disk=190GiB",
        "mode=deployment,exposure.type=clusterIP,exposure.clusterIP=fd00::5,exposure.ipv6=true,containerd.nodeSelector.pool=a,\
         podDisruptionBudget.minAvailable=2",
        "criticalPodsQuota=true,podSecurityContext.seLinuxOptions.type=spc_t,cache.keepAfterUninstall=true,secrets[0].name=hub.corp,\
         secrets[0].mountPath=/etc/dray/secrets/hub",
        "mode=statefulset,cache.volume.storage=200Gi,cache.disk=190GiB",
        "mode=statefulset,cache.volume.storage=200Gi,cache.volume.storageClassName=fast,cache.disk=190GiB,zones.by=nodes,\
         zones.names={a,b},podDisruptionBudget.minAvailable=2,networkPolicy.enabled=true",
        "mode=deployment,containerd.enabled=false,networkPolicy.enabled=true,metrics.enabled=true",
        "nameOverride=mirror,fullnameOverride=cache,commonLabels.team=a,serviceAccount.create=true,\
         serviceAccount.annotations.role=a,securityContext.runAsUser=1000,updateStrategy.type=OnDelete,\
         extraVolumes[0].name=tmp,extraVolumes[0].emptyDir.medium=Memory,extraVolumeMounts[0].name=tmp,\
         extraVolumeMounts[0].mountPath=/tmp",
        "mode=deployment,affinity.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution=null,zones.by=nodes,\
         zones.names={a}",
        "mode=deployment,zones.by=nodes,zones.names={a,b},secrets[0].name=hub,secrets[0].mountPath=/etc/dray/secrets/hub",
    ];
    let mut matrix: Vec<Vec<String>> = sets.iter().map(|set| vec!["--set".to_owned(), (*set).to_owned()]).collect();
    for file in values_files() {
        matrix.push(vec!["--values".into(), file.to_str().unwrap().into()]);
    }
    matrix
}

/// The values files for distributions.
fn values_files() -> Vec<PathBuf> {
    let listed = std::fs::read_dir(k8s_dir().join("values")).unwrap();
    listed.map(|entry| entry.unwrap().path()).collect()
}

fn rendered(arguments: &[String]) -> String {
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    render(&arguments).unwrap_or_else(|e| panic!("{arguments:?}: {e}"))
}

fn pods(documents: &[Value]) -> Vec<&Value> {
    let kinds = ["DaemonSet", "Deployment", "StatefulSet", "Job"].into_iter();
    let templates = kinds.flat_map(|kind| of_kind(documents, kind)).map(|workload| &workload["spec"]["template"]);
    templates.chain(of_kind(documents, "Pod")).collect()
}

fn selects(selector: &Value, labels: &Value) -> bool {
    selector.as_mapping().unwrap().iter().all(|(key, value)| &labels[key] == value)
}

fn containers(pod: &Value) -> Vec<&Value> {
    let lists = [&pod["spec"]["initContainers"], &pod["spec"]["containers"]];
    lists.into_iter().filter_map(Value::as_sequence).flatten().collect()
}

/// Every reference between the documents is right.
fn assert_consistent(documents: &[Value]) {
    for workload in ["DaemonSet", "Deployment", "StatefulSet"].into_iter().flat_map(|kind| of_kind(documents, kind)) {
        let labels = &workload["spec"]["template"]["metadata"]["labels"];
        assert!(selects(&workload["spec"]["selector"]["matchLabels"], labels));
    }
    let pods = pods(documents);
    for service in of_kind(documents, "Service") {
        let selector = &service["spec"]["selector"];
        // Kubernetes itself adds this label to pods.
        let mut own = selector.as_mapping().unwrap().clone();
        own.remove("topology.kubernetes.io/zone");
        let selector = Value::Mapping(own);
        assert!(pods.iter().any(|pod| selects(&selector, &pod["metadata"]["labels"])), "{service:?}");
        if service["metadata"]["name"].as_str().unwrap().contains("peers") {
            assert_eq!(
                (&service["spec"]["clusterIP"], &service["spec"]["publishNotReadyAddresses"]),
                (&"None".into(), &true.into())
            );
        }
    }
    for pod in pods {
        let spec = &pod["spec"];
        assert_eq!(spec["automountServiceAccountToken"], false);
        let claims = of_kind(documents, "StatefulSet").into_iter().filter(|set| set["spec"]["template"] == *pod);
        let claims = claims.filter_map(|set| set["spec"]["volumeClaimTemplates"].as_sequence()).flatten();
        let claims = claims.map(|claim| claim["metadata"]["name"].as_str().unwrap());
        let volumes = spec["volumes"].as_sequence().into_iter().flatten();
        let volumes: BTreeSet<_> = volumes.map(|volume| volume["name"].as_str().unwrap()).chain(claims).collect();
        let mut mounted = BTreeSet::new();
        for container in containers(pod) {
            let security = &container["securityContext"];
            assert_eq!(security["readOnlyRootFilesystem"], true);
            assert_eq!(security["allowPrivilegeEscalation"], false);
            assert_eq!(security["capabilities"]["drop"][0], "ALL");
            assert_eq!(security["seccompProfile"]["type"], "RuntimeDefault");
            if security["runAsUser"] == 0 {
                assert!(
                    texts(&security["capabilities"]["add"])
                        .iter()
                        .all(|one| ["CHOWN", "DAC_OVERRIDE", "FOWNER"].contains(one))
                );
                let arguments = texts(&container["args"]);
                assert!(["prepare", "uninstall"].iter().any(|only| arguments.contains(only)), "{arguments:?} as root");
            }
            for mount in container["volumeMounts"].as_sequence().into_iter().flatten() {
                mounted.insert(mount["name"].as_str().unwrap());
            }
            assert_flags_exist(&texts(&container["args"]));
        }
        assert_eq!(volumes, mounted, "every volume is mounted, and every mount is a volume");
    }
    // No document grants rights in the cluster.
    let kinds: BTreeSet<_> = documents.iter().map(|document| document["kind"].as_str().unwrap()).collect();
    assert!(kinds.iter().all(|kind| !kind.contains("Role")), "{kinds:?}");
    assert_config_valid(documents);
}

/// dray has every command and flag of a container's arguments.
fn assert_flags_exist(arguments: &[&str]) {
    let commands: Vec<_> = arguments.iter().take_while(|argument| !argument.starts_with("--")).collect();
    let help = output(Command::new(binary()).args(commands).arg("--help"));
    assert!(help.status.success(), "{arguments:?}");
    let help = String::from_utf8_lossy(&help.stdout).into_owned();
    for flag in arguments.iter().filter(|argument| argument.starts_with("--")) {
        let name = flag.split('=').next().unwrap();
        assert!(help.split_whitespace().any(|word| word == name), "{name} of {arguments:?}");
    }
}

/// dray accepts its file, and the file names existing Services.
fn assert_config_valid(documents: &[Value]) {
    let config = of_kind(documents, "ConfigMap")[0]["data"]["dray.toml"].as_str().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("dray.toml");
    std::fs::write(&path, config).unwrap();
    let checked = output(Command::new(binary()).arg("check-config").arg(&path));
    assert!(checked.status.success(), "{config}\n{}", String::from_utf8_lossy(&checked.stderr));
    let service = &config.parse::<toml::Table>().unwrap()["peers"]["service"];
    let named: BTreeSet<_> = match service.as_table() {
        Some(zones) => zones.values().map(|name| name.as_str().unwrap().to_owned()).collect(),
        None => [service.as_str().unwrap().to_owned()].into(),
    };
    // Pods of a StatefulSet are known by their names.
    let srv = if of_kind(documents, "StatefulSet").is_empty() { "" } else { "_peers._tcp." };
    let services =
        of_kind(documents, "Service").into_iter().map(|service| service["metadata"]["name"].as_str().unwrap());
    let headless: BTreeSet<_> = services
        .filter(|name| name.contains("-peers"))
        .map(|name| format!("{srv}{name}.dray.svc.cluster.local"))
        .collect();
    assert_eq!(named, headless);
}

#[test]
fn every_values_combination_is_consistent() {
    for arguments in matrix() {
        let documents = documents(&rendered(&arguments));
        assert!(documents.len() >= 3, "{arguments:?}");
        assert_consistent(&documents);
    }
}

#[test]
fn kubernetes_accepts_every_values_combination() {
    let dir = tempfile::tempdir().unwrap();
    let mut files = Vec::new();
    for (nth, arguments) in matrix().iter().enumerate() {
        // Custom resources have no schema.
        let known = documents(&rendered(arguments)).into_iter().filter(|document| document["kind"] != "ServiceMonitor");
        for (part, document) in known.enumerate() {
            let file = dir.path().join(format!("{nth}-{part}.yaml"));
            std::fs::write(&file, serde_yaml_ng::to_string(&document).unwrap()).unwrap();
            files.push(file);
        }
    }
    let python = tool("python");
    for version in KUBERNETES {
        let mut command = Command::new("python3");
        command.env("PYTHONPATH", &python).args(["-m", "kubernetes_validate", "--strict", "--quiet", "-k", version]);
        run(command.args(&files));
        // The validator really uses the schemas.
        let wrong = dir.path().join("wrong.yaml");
        std::fs::write(&wrong, "apiVersion: apps/v1\nkind: DaemonSet\nmetadata: {name: a}\nspec: {bogus: 1}\n")
            .unwrap();
        let mut command = Command::new("python3");
        command.env("PYTHONPATH", &python).args(["-m", "kubernetes_validate", "--strict", "--quiet", "-k", version]);
        assert!(!output(command.arg(&wrong)).status.success());
    }
}

#[test]
fn helm_lint_reports_nothing() {
    let linted = run(Command::new(tool("helm"))
        .args(["lint", "--strict", "--kube-version", "1.37.0"])
        .arg(k8s_dir().join("dray")));
    assert!(linted.contains("0 chart(s) failed"), "{linted}");
}

#[test]
fn invalid_values_are_explained() {
    for (set, expected) in [
        ("mode=replicaset", "mode"),
        ("mode=statefulset", "cache.volume.storage"),
        ("mode=statefulset,cache.volume.storage=1Gi,zones.by=podLabel,zones.names={a}", "zones.by"),
        ("containerd.hostsDir=certs.d", "/containerd/hostsDir"),
        ("containerd.hostsDir=/a:/b", "/containerd/hostsDir"),
        ("containerd.hostDir=/a", "hostDir"),
        ("cache.disk=20GB", "/cache/disk"),
        ("cache.disk=999%", "/cache/disk"),
        ("cache.hostPath=/", "/cache/hostPath"),
        ("exposure.port=0", "/exposure/port"),
        ("cache.volume.storage=10GiB", "/cache/volume/storage"),
        ("cache.volume.storage=10Gi", "mode: deployment or statefulset"),
        ("exposure.type=nodePort", "mode: deployment or statefulset"),
        ("mode=deployment,exposure.type=hostNetwork", "mode: daemonset"),
        ("mode=deployment,exposure.type=clusterIP", "exposure.clusterIP"),
        ("exposure.mirror=http://a/v2", "/exposure/mirror"),
        ("zones.by=nodes", "zones.names"),
        ("serviceMonitor.enabled=true", "metrics.enabled"),
        ("prometheusRule.enabled=true", "metrics.enabled"),
        ("grafanaDashboard.enabled=true", "metrics.enabled"),
        ("extraEnv[0].value=x", "/extraEnv/0"),
        ("peers.port=5051", "a port of its own"),
        ("mode=deployment,peers.port=5050", "a port of its own"),
        ("extraConfig=[cache]\ndisk = \"1GiB\"", "written by the chart"),
        ("extraConfig=  [[registry]]\n\n[ peers ]", "written by the chart"),
        ("extraConfig=# rules\nlisten = \"0.0.0.0:5050\"", "outside of a table"),
        ("podDisruptionBudget.minAvailabel=1", "/podDisruptionBudget"),
        ("podSecurityContext.seLinuxOptions.typ=spc_t", "/podSecurityContext/seLinuxOptions"),
        (
            "zones.by=podLabel,zones.names={a-very-long-name-for-a-zone-that-nobody-needs-at-all-but-has}",
            "63 characters",
        ),
        ("containerd.hostsDir=/", "/containerd/hostsDir"),
        ("exposure.ipv6=true,exposure.type=hostPort", "exposure.mirror"),
        ("mode=deployment,exposure.ipv6=true", "exposure.mirror"),
        ("bogus=1", "bogus"),
        ("reach.by=hostPort", "exposure.type"),
        ("config=[[registry]]", "extraConfig"),
        ("metrics.dashboard.enabled=true", "grafanaDashboard"),
        ("image.pullSecrets={a}", "imagePullSecrets"),
        ("cache.keepFree=5%", "cache.minFree"),
    ] {
        let error = render(&["--set", set]).unwrap_err();
        assert!(error.contains(expected), "{set}: {error}");
    }
}

#[test]
fn plain_manifests_match_the_chart() {
    let dir = tempfile::tempdir().unwrap();
    run(Command::new(k8s_dir().join("render.sh")).arg(tool("helm")).arg(dir.path()));
    for name in ["daemonset.yaml", "deployment.yaml"] {
        let kept = std::fs::read_to_string(k8s_dir().join(name)).unwrap();
        let made = std::fs::read_to_string(dir.path().join(name)).unwrap();
        assert!(kept == made, "k8s/{name} is old: make manifests");
        assert_consistent(&documents(&kept));
    }
}

/// A variable in the image would override the configuration file of its user.
#[test]
fn image_sets_no_dray_variables() {
    let file = std::fs::read_to_string(k8s_dir().join("Containerfile")).unwrap();
    let variables: Vec<_> = file.lines().filter_map(|line| line.strip_prefix("ENV ")).collect();
    assert_eq!(variables, ["XDG_CACHE_HOME=/var/cache"]);
}

/// A page of docs/kubernetes.
fn page(name: &str) -> String {
    text(&format!("docs/kubernetes/{name}"))
}

/// The examples of the documentation are valid, and dray accepts its parts.
#[test]
fn documented_examples_are_valid() {
    for (name, examples) in [("distributions.md", 1), ("chart.md", 7), ("ci-runners.md", 1)] {
        let found = blocks(&page(name), "yaml");
        assert_eq!(found.len(), examples, "{name}");
        for example in found {
            serde_yaml_ng::from_str::<Value>(&example).unwrap();
        }
    }
    let pod: Value = serde_yaml_ng::from_str(&blocks(&page("ci-runners.md"), "yaml")[0]).unwrap();
    assert_flags_exist(&texts(&pod["spec"]["initContainers"][0]["args"]));
    // The examples of the chart's page are values of the chart.
    let dir = tempfile::tempdir().unwrap();
    for (nth, text) in blocks(&page("chart.md"), "yaml").iter().enumerate() {
        let file = dir.path().join(format!("{nth}.yaml"));
        std::fs::write(&file, text).unwrap();
        assert_consistent(&documents(&render(&["--values", file.to_str().unwrap()]).unwrap()));
    }
    // Each command names an existing runtime.
    for name in ["distributions.md", "chart.md", "ci-runners.md", "../runtimes.md"] {
        for rest in page(name).split("dray runtime-config ").skip(1) {
            let runtime: String = rest.chars().take_while(char::is_ascii_alphanumeric).collect();
            let is_known = || output(Command::new(binary()).args(["runtime-config", &runtime])).status.success();
            assert!(runtime == "NAME" || is_known(), "{name}: {runtime}");
        }
    }
    // Each values file is linked, and each link is a file.
    let distributions = page("distributions.md");
    let links = distributions.split("](../../k8s/values/").skip(1).map(|rest| rest.split(')').next().unwrap());
    let linked: BTreeSet<PathBuf> = links.map(|file| k8s_dir().join("values").join(file)).collect();
    let files: BTreeSet<PathBuf> = values_files().into_iter().collect();
    assert_eq!(linked, files);
}
