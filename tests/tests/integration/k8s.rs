//! The chart and the manifests made from it fit together, and Kubernetes takes them.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;

use dray_tests::chart::{Value, documents, k8s_dir, of_kind, render, texts};
use dray_tests::dray::binary;
use dray_tests::process::{output, run};
use dray_tests::tool;

/// The three latest that the schemas know.
const KUBERNETES: [&str; 3] = ["1.35", "1.36", "1.37"];

/// Values that differ from each other in all that a template asks about.
fn matrix() -> Vec<Vec<String>> {
    let sets = [
        "",
        "reach.by=hostPort,networkPolicy.enabled=true",
        "containerd.enabled=false,serviceAccountName=dray,metrics.tokenSecret=dray-admin",
        "containerd.configFile=/etc/containerd/config.toml,peers.keySecret=peers",
        "metrics.enabled=true,metrics.serviceMonitor.enabled=true,metrics.prometheusRule.enabled=true,\
         metrics.dashboard.enabled=true,env[0].name=HTTPS_PROXY,env[0].value=http://proxy:3128",
        "zones.by=nodes,zones.names={a,b-1},zones.policy=isolate",
        "zones.by=podLabel,zones.names={a,b}",
        "mode=deployment",
        "mode=deployment,reach.by=clusterIP,reach.clusterIP=10.96.0.50,image.pullSecrets={robot}",
        "mode=deployment,cache.volume.storage=200Gi,cache.volume.storageClassName=fast,cache.disk=190GiB",
        "mode=deployment,reach.by=clusterIP,reach.clusterIP=fd00::5,reach.ipv6=true,containerd.nodeSelector.pool=a,\
         podDisruptionBudget.minAvailable=2",
        "criticalPodsQuota=true,seLinuxOptions.type=spc_t,cache.keepAfterUninstall=true,secrets[0].name=hub.corp,\
         secrets[0].mountPath=/etc/dray/secrets/hub",
        "mode=deployment,containerd.enabled=false,networkPolicy.enabled=true,metrics.enabled=true",
        "mode=deployment,zones.by=nodes,zones.names={a,b},secrets[0].name=hub,secrets[0].mountPath=/etc/dray/secrets/hub",
    ];
    let mut matrix: Vec<Vec<String>> = sets.iter().map(|set| vec!["--set".to_owned(), (*set).to_owned()]).collect();
    for file in values_files() {
        matrix.push(vec!["--values".into(), file.to_str().unwrap().into()]);
    }
    matrix
}

/// Values for the distributions that need others.
fn values_files() -> Vec<PathBuf> {
    let listed = std::fs::read_dir(k8s_dir().join("values")).unwrap();
    listed.map(|entry| entry.unwrap().path()).collect()
}

fn rendered(arguments: &[String]) -> String {
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    render(&arguments).unwrap_or_else(|e| panic!("{arguments:?}: {e}"))
}

fn pods(documents: &[Value]) -> Vec<&Value> {
    let kinds = ["DaemonSet", "Deployment", "Job"].into_iter();
    kinds.flat_map(|kind| of_kind(documents, kind)).map(|workload| &workload["spec"]["template"]).collect()
}

fn selects(selector: &Value, labels: &Value) -> bool {
    selector.as_mapping().unwrap().iter().all(|(key, value)| &labels[key] == value)
}

fn containers(pod: &Value) -> Vec<&Value> {
    let lists = [&pod["spec"]["initContainers"], &pod["spec"]["containers"]];
    lists.into_iter().filter_map(Value::as_sequence).flatten().collect()
}

/// Everything that one part says of another is so.
fn fits_together(documents: &[Value]) {
    for workload in ["DaemonSet", "Deployment"].into_iter().flat_map(|kind| of_kind(documents, kind)) {
        let labels = &workload["spec"]["template"]["metadata"]["labels"];
        assert!(selects(&workload["spec"]["selector"]["matchLabels"], labels));
    }
    let pods = pods(documents);
    for service in of_kind(documents, "Service") {
        let selector = &service["spec"]["selector"];
        // Kubernetes puts this label on pods itself.
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
        let volumes: BTreeSet<_> = spec["volumes"]
            .as_sequence()
            .into_iter()
            .flatten()
            .map(|volume| volume["name"].as_str().unwrap())
            .collect();
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
                assert!(
                    ["hand-over", "uninstall"].iter().any(|only| arguments.contains(only)),
                    "{arguments:?} as root"
                );
            }
            for mount in container["volumeMounts"].as_sequence().into_iter().flatten() {
                mounted.insert(mount["name"].as_str().unwrap());
            }
            understands(&texts(&container["args"]));
        }
        assert_eq!(volumes, mounted, "every volume is mounted, and nothing else");
    }
    // Nobody gets a right on the cluster.
    let kinds: BTreeSet<_> = documents.iter().map(|document| document["kind"].as_str().unwrap()).collect();
    assert!(kinds.iter().all(|kind| !kind.contains("Role") && *kind != "ServiceAccount"), "{kinds:?}");
    configures(documents);
}

/// dray has every command and flag that a container is started with.
fn understands(arguments: &[&str]) {
    let commands: Vec<_> = arguments.iter().take_while(|argument| !argument.starts_with("--")).collect();
    let help = output(Command::new(binary()).args(commands).arg("--help"));
    assert!(help.status.success(), "{arguments:?}");
    let help = String::from_utf8_lossy(&help.stdout).into_owned();
    for flag in arguments.iter().filter(|argument| argument.starts_with("--")) {
        let name = flag.split('=').next().unwrap();
        assert!(help.contains(&format!("{name} ")), "{name} of {arguments:?}");
    }
}

/// dray understands its file, and it names Services that are there.
fn configures(documents: &[Value]) {
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
    let services =
        of_kind(documents, "Service").into_iter().map(|service| service["metadata"]["name"].as_str().unwrap());
    let headless: BTreeSet<_> =
        services.filter(|name| name.contains("-peers")).map(|name| format!("{name}.dray.svc.cluster.local")).collect();
    assert_eq!(named, headless);
}

#[test]
fn every_combination_fits_together() {
    for arguments in matrix() {
        let documents = documents(&rendered(&arguments));
        assert!(documents.len() >= 3, "{arguments:?}");
        fits_together(&documents);
    }
}

#[test]
fn kubernetes_takes_every_combination() {
    let dir = tempfile::tempdir().unwrap();
    let mut files = Vec::new();
    for (nth, arguments) in matrix().iter().enumerate() {
        // What is no part of Kubernetes has no schema there.
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
        // The schemas are really asked.
        let wrong = dir.path().join("wrong.yaml");
        std::fs::write(&wrong, "apiVersion: apps/v1\nkind: DaemonSet\nmetadata: {name: a}\nspec: {bogus: 1}\n")
            .unwrap();
        let mut command = Command::new("python3");
        command.env("PYTHONPATH", &python).args(["-m", "kubernetes_validate", "--strict", "--quiet", "-k", version]);
        assert!(!output(command.arg(&wrong)).status.success());
    }
}

#[test]
fn helm_finds_nothing_to_say() {
    let linted = run(Command::new(tool("helm"))
        .args(["lint", "--strict", "--kube-version", "1.37.0"])
        .arg(k8s_dir().join("dray")));
    assert!(linted.contains("0 chart(s) failed"), "{linted}");
}

#[test]
fn wrong_values_are_explained() {
    for (set, wants) in [
        ("mode=statefulset", "mode"),
        ("containerd.hostsDir=certs.d", "/containerd/hostsDir"),
        ("containerd.hostsDir=/a:/b", "/containerd/hostsDir"),
        ("containerd.hostDir=/a", "hostDir"),
        ("cache.disk=20GB", "/cache/disk"),
        ("cache.disk=999%", "/cache/disk"),
        ("cache.hostPath=/", "/cache/hostPath"),
        ("reach.port=0", "/reach/port"),
        ("cache.volume.storage=10GiB", "/cache/volume/storage"),
        ("cache.volume.storage=10Gi", "mode: deployment"),
        ("reach.by=nodePort", "mode: deployment"),
        ("mode=deployment,reach.by=hostNetwork", "mode: daemonset"),
        ("mode=deployment,reach.by=clusterIP", "reach.clusterIP"),
        ("reach.mirror=http://a/v2", "/reach/mirror"),
        ("zones.by=nodes", "zones.names"),
        ("metrics.serviceMonitor.enabled=true", "metrics.enabled"),
        ("metrics.prometheusRule.enabled=true", "metrics.enabled"),
        ("metrics.dashboard.enabled=true", "metrics.enabled"),
        ("env[0].value=x", "/env/0"),
        ("peers.port=5051", "a port of its own"),
        ("mode=deployment,peers.port=5050", "a port of its own"),
        ("config=[cache]\ndisk = \"1GiB\"", "written by the chart"),
        ("config=  [[registry]]\n\n[ peers ]", "written by the chart"),
        ("config=# rules\nlisten = \"0.0.0.0:5050\"", "stands in no table"),
        ("podDisruptionBudget.minAvailabel=1", "/podDisruptionBudget"),
        ("seLinuxOptions.typ=spc_t", "/seLinuxOptions"),
        (
            "zones.by=podLabel,zones.names={a-very-long-name-for-a-zone-that-nobody-needs-at-all-but-has}",
            "63 characters",
        ),
        ("containerd.hostsDir=/", "/containerd/hostsDir"),
        ("reach.ipv6=true,reach.by=hostPort", "reach.mirror"),
        ("mode=deployment,reach.ipv6=true", "reach.mirror"),
        ("bogus=1", "bogus"),
    ] {
        let error = render(&["--set", set]).unwrap_err();
        assert!(error.contains(wants), "{set}: {error}");
    }
}

#[test]
fn the_plain_manifests_are_those_of_the_chart() {
    let dir = tempfile::tempdir().unwrap();
    run(Command::new(k8s_dir().join("render.sh")).arg(tool("helm")).arg(dir.path()));
    for name in ["daemonset.yaml", "deployment.yaml"] {
        let kept = std::fs::read_to_string(k8s_dir().join(name)).unwrap();
        let made = std::fs::read_to_string(dir.path().join(name)).unwrap();
        assert!(kept == made, "k8s/{name} is old: make manifests");
        fits_together(&documents(&kept));
    }
}

/// A variable in the image would override the file of whoever runs it.
#[test]
fn the_image_sets_no_variables_of_drays_own() {
    let file = std::fs::read_to_string(k8s_dir().join("Containerfile")).unwrap();
    let variables: Vec<_> = file.lines().filter_map(|line| line.strip_prefix("ENV ")).collect();
    assert_eq!(variables, ["XDG_CACHE_HOME=/var/cache"]);
}

/// What people copy from the page is valid, and dray understands its part of it.
#[test]
fn the_examples_of_the_page_are_valid() {
    let page = std::fs::read_to_string(k8s_dir().join("README.md")).unwrap();
    let blocks = |language: &str| {
        let parts = page.split("```").skip(1).step_by(2);
        let texts = parts.filter_map(|block| block.strip_prefix(&format!("{language}\n")).map(str::to_owned));
        texts.collect::<Vec<_>>()
    };
    let yaml: Vec<Value> = blocks("yaml").iter().map(|text| serde_yaml_ng::from_str(text).unwrap()).collect();
    assert_eq!((yaml.len(), blocks("toml").len()), (3, 1));
    for text in blocks("toml") {
        text.parse::<toml::Table>().unwrap();
    }
    let sidecar = yaml.iter().find_map(|block| block.get("spec")?.get("initContainers")?.get(0)).unwrap();
    understands(&texts(&sidecar["args"]));
    // Values for the chart are values of the chart.
    let values = yaml.iter().find(|block| block.get("secrets").is_some()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("values.yaml");
    std::fs::write(&file, serde_yaml_ng::to_string(values).unwrap()).unwrap();
    fits_together(&documents(&render(&["--values", file.to_str().unwrap()]).unwrap()));
    // Each row's command names a runtime that there is.
    for name in page.split("`dray runtime ").skip(1).map(|rest| rest.split(['`', ' ']).next().unwrap()) {
        assert!(output(Command::new(binary()).args(["runtime", name])).status.success(), "{name}");
    }
    for file in page.split("](values/").skip(1).map(|rest| rest.split(')').next().unwrap()) {
        assert!(k8s_dir().join("values").join(file).exists(), "{file}");
    }
}
