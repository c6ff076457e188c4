//! Several drays, each in its own network namespace behind a link of a given speed, with an upstream and a name server,
//! in one zone or several.

use std::fmt::Write;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::dray::binary;
use crate::process::{Process, output, run};

/// The network. Speeds in Mbit/s.
#[derive(Clone)]
pub struct Topology {
    /// Nodes in each zone.
    pub zones: Vec<usize>,
    pub node: u32,
    pub upstream: u32,
    /// Link between each zone and the first one.
    pub between_zones: u32,
    /// One slower node and its speed.
    pub slow: Option<(usize, u32)>,
    /// Members of the first zone that have a DNS record, but no process.
    pub unreachable_members: u16,
    /// Lines added to the `[peers]` table.
    pub peers: &'static str,
    /// Lines added to the rule of the upstream.
    pub rule: &'static str,
    /// Whether the upstream has a link into each zone. Otherwise it is connected to the first zone only.
    pub upstream_per_zone: bool,
}

/// A running cluster. All its processes and namespaces are removed when it is dropped.
pub struct Cluster {
    topology: Topology,
    name: String,
    nodes: Vec<Node>,
    upstream: Option<Process>,
    dns: Process,
    dir: tempfile::TempDir,
}

/// One node, running or stopped.
struct Node {
    zone: usize,
    address: Ipv4Addr,
    process: Mutex<Option<Process>>,
    known: bool,
}

/// A response body as the client received it.
#[derive(Clone, Debug)]
pub struct Pulled {
    pub seconds: f64,
    pub status: u16,
    /// Digest of the received body. None: the transfer was incomplete.
    pub digest: Option<String>,
}

const DNS: Ipv4Addr = Ipv4Addr::new(10, 77, 255, 53);
const UPSTREAM: Ipv4Addr = Ipv4Addr::new(10, 77, 254, 1);

impl Default for Topology {
    fn default() -> Self {
        Self {
            zones: vec![8],
            node: 400,
            upstream: 200,
            between_zones: 1000,
            slow: None,
            unreachable_members: 0,
            peers: "",
            rule: "",
            upstream_per_zone: false,
        }
    }
}

/// Why clusters cannot be created on this machine: a reason to skip a test. In CI this panics, so that tests are not
/// skipped unnoticed.
pub fn unavailable() -> Option<String> {
    let tried = output(Command::new("unshare").args(["--net", "--mount", "true"]));
    let reason = (!tried.status.success())
        .then(|| "network namespaces are not allowed on this machine (root is needed)".to_owned());
    assert!(reason.is_none() || std::env::var_os("CI").is_none(), "{reason:?}");
    reason
}

impl Cluster {
    /// Starts the network, the name server and the upstream, which serves `www` of `dir`; then all nodes.
    pub fn start(topology: Topology, dir: tempfile::TempDir) -> Self {
        Self::start_without(topology, dir, &[])
    }

    /// The same, but these nodes are neither started nor known to DNS.
    pub fn start_without(topology: Topology, dir: tempfile::TempDir, later: &[usize]) -> Self {
        let mut cluster = Self::without_nodes(topology, dir);
        let now: Vec<usize> = cluster.all_nodes().into_iter().filter(|node| !later.contains(node)).collect();
        now.iter().for_each(|node| cluster.nodes[*node].known = true);
        cluster.update_dns();
        now.into_iter().for_each(|node| cluster.launch(node));
        cluster.wait_until_formed();
        cluster
    }

    fn without_nodes(topology: Topology, dir: tempfile::TempDir) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("dray{}x{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        for zone in 0..topology.zones.len() {
            let switch = format!("{name}s{zone}");
            ip(&["netns", "add", &switch]);
            within(&switch, &["ip", "link", "add", "br0", "type", "bridge"]);
            within(&switch, &["ip", "link", "set", "br0", "up"]);
            within(&switch, &["ip", "link", "set", "lo", "up"]);
            if zone > 0 {
                connect(&format!("{name}s0"), &format!("z{zone}"), &switch, "z0", topology.between_zones);
                bridge(&format!("{name}s0"), &format!("z{zone}"));
                bridge(&switch, "z0");
            }
        }
        let first = format!("{name}s0");
        within(&first, &["ip", "address", "add", &format!("{DNS}/16"), "dev", "br0"]);
        host(&name, "o", 0, UPSTREAM, topology.upstream);
        if topology.upstream_per_zone {
            (1..topology.zones.len()).for_each(|zone| add_upstream_card(&name, zone, topology.upstream));
        }
        let mut nodes = Vec::new();
        for (zone, count) in topology.zones.iter().enumerate() {
            for _ in 0..*count {
                let nth = nodes.len();
                let [zone_byte, nth_byte] = [zone, nth + 1].map(|n| u8::try_from(n).expect("a small cluster"));
                let address = Ipv4Addr::new(10, 77, zone_byte, nth_byte);
                let speed = topology.slow.filter(|(slow, _)| *slow == nth).map_or(topology.node, |(_, speed)| speed);
                host(&name, &format!("n{nth}"), zone, address, speed);
                if topology.upstream_per_zone && zone > 0 {
                    use_upstream_card(&format!("{name}n{nth}"), zone);
                }
                nodes.push(Node { zone, address, process: Mutex::default(), known: false });
            }
        }
        fs::create_dir_all(dir.path().join("www")).expect("a directory");
        fs::write(dir.path().join("hosts"), "").expect("a file");
        let dns = start_dns(&first, dir.path());
        let mut cluster = Self { topology, name, nodes, upstream: None, dns, dir };
        cluster.start_upstream();
        cluster
    }

    /// Starts the upstream, also after `stop_upstream`.
    pub fn start_upstream(&mut self) {
        let dir = self.dir.path();
        fs::set_permissions(dir, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("a directory of ours");
        let text = format!(
            "daemon off;\nmaster_process off;\nworker_processes 1;\npid {dir}/nginx.pid;\nerror_log {dir}/error.log;\n\
             events {{}}\nhttp {{\n  log_format short '$status $body_bytes_sent';\n  access_log {dir}/access.log short;\n  \
             sendfile on;\n  default_type application/octet-stream;\n  root {dir}/www;\n  \
             server {{ listen 80; location = /v2/ {{ access_log off; return 200 '{{}}'; }} }}\n}}\n",
            dir = dir.display()
        );
        fs::write(dir.join("nginx.conf"), text).expect("the configuration is written");
        let mut command = inside(&format!("{}o", self.name), "nginx");
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").arg("-c").arg(dir.join("nginx.conf"));
        self.upstream = Some(Process::spawn(command.stdout(Stdio::null()).stderr(Stdio::null())));
        self.wait_for("the upstream listens", 0, &format!("http://{UPSTREAM}/v2/"));
    }

    pub fn stop_upstream(&mut self) {
        self.upstream = None;
    }

    /// Body bytes that the upstream has sent.
    pub fn upstream_bytes(&self) -> u64 {
        let log = fs::read_to_string(self.dir.path().join("access.log")).unwrap_or_default();
        log.lines().filter_map(|line| line.split(' ').nth(1)?.parse::<u64>().ok()).sum()
    }

    /// All nodes, running or stopped.
    pub fn all_nodes(&self) -> Vec<usize> {
        (0..self.nodes.len()).collect()
    }

    /// Publishes a node in DNS and starts it.
    pub fn join(&mut self, node: usize) {
        self.nodes[node].known = true;
        self.update_dns();
        self.launch(node);
    }

    /// Starts a node's process.
    pub fn launch(&self, node: usize) {
        let config = self.config(node);
        let mut command = inside(&self.namespace(node), binary().to_str().expect("a path in UTF-8"));
        command.args(["--listen", "127.0.0.1:5050", "--admin", "127.0.0.1:5051", "--config"]).arg(config);
        command.args(["--cache-disk", "4GiB", "--cache-memory", "16MiB", "--cache-dir"]).arg(self.cache(node));
        if std::env::var_os("DRAY_LOG").is_none() {
            command.env("DRAY_LOG", "error");
        }
        let log = fs::File::create(self.dir.path().join(format!("node{node}.log"))).expect("a log");
        let mut process = Process::spawn(command.stdout(Stdio::piped()).stderr(log));
        process.line("listening ");
        *self.process(node) = Some(process);
    }

    pub fn kill(&self, node: usize) {
        if let Some(mut process) = self.process(node).take() {
            process.kill();
        }
    }

    /// Stops a node's process with SIGSTOP: connections stay open, but nothing responds.
    pub fn freeze(&self, node: usize) {
        if let Some(process) = &*self.process(node) {
            process.signal(Signal::STOP);
        }
    }

    /// Stops a node with SIGTERM, as an orchestrator does, and waits for its end.
    pub fn stop(&self, node: usize) {
        let stopped = self.process(node).take();
        if let Some(mut process) = stopped {
            process.signal(Signal::TERM);
            process.wait();
        }
    }

    /// Takes the link of a node down.
    pub fn disconnect(&self, node: usize) {
        self.link(node, "down");
    }

    pub fn reconnect(&self, node: usize) {
        self.link(node, "up");
    }

    fn link(&self, node: usize, state: &str) {
        let switch = format!("{}s{}", self.name, self.nodes[node].zone);
        within(&switch, &["ip", "link", "set", &format!("pn{node}"), state]);
    }

    /// Removes the cache of a node.
    pub fn clear(&self, node: usize) {
        let _ = fs::remove_dir_all(self.cache(node));
    }

    /// The node that stores the complete blob under its digest.
    pub fn owner(&self, path: &str) -> usize {
        let digest = path.split(['/', '?']).find_map(|part| part.strip_prefix("sha256:")).expect("a blob's path");
        let file = format!("v1/blobs/sha256/{}/{digest}", &digest[..2]);
        let stores = |node: &usize| self.cache(*node).join(&file).exists();
        self.all_nodes().into_iter().find(stores).expect("a node owns it")
    }

    pub fn cache(&self, node: usize) -> PathBuf {
        self.dir.path().join(format!("cache{node}"))
    }

    /// Requests a path from the dray of a node, by a client on that node.
    pub fn pull(&self, node: usize, path: &str) -> Pulled {
        let started = Instant::now();
        let file = self.dir.path().join(format!("body{node}-{}", fastrand::u64(..)));
        let mut curl = inside(&self.namespace(node), "curl");
        curl.args(["-s", "--noproxy", "*", "--max-time", "120", "-w", "%{http_code}", "-o"]).arg(&file);
        let got = output(curl.arg(format!("http://127.0.0.1:5050{path}")));
        let seconds = started.elapsed().as_secs_f64();
        let digest = got.status.success().then(|| sha256(&file));
        let _ = fs::remove_file(&file);
        let status = String::from_utf8_lossy(&got.stdout).trim().parse().unwrap_or(0);
        Pulled { seconds, status, digest }
    }

    /// Seconds that a client on each of these nodes takes for a path, all at the same time. The body is discarded.
    pub fn time_pulls(&self, nodes: &[usize], path: &str) -> Vec<f64> {
        std::thread::scope(|scope| {
            let pull = |node: &usize| {
                let mut curl = inside(&self.namespace(*node), "curl");
                curl.args(["-s", "--fail", "--noproxy", "*", "--max-time", "300", "-o", "/dev/null"]);
                curl.args(["-w", "%{time_total}"]).arg(format!("http://127.0.0.1:5050{path}"));
                scope.spawn(move || run(&mut curl).trim().parse().expect("seconds"))
            };
            let pulls: Vec<_> = nodes.iter().map(pull).collect();
            pulls.into_iter().map(|pull| pull.join().expect("a client")).collect()
        })
    }

    /// Process ID of a running node.
    pub fn pid(&self, node: usize) -> u32 {
        self.process(node).as_ref().expect("the node runs").id()
    }

    /// Bytes that a node's network card has received.
    pub fn received(&self, node: usize) -> u64 {
        self.card_counter(node, "rx_bytes")
    }

    /// Bytes that a node's network card has sent.
    pub fn sent(&self, node: usize) -> u64 {
        self.card_counter(node, "tx_bytes")
    }

    fn card_counter(&self, node: usize, name: &str) -> u64 {
        let path = format!("/sys/class/net/eth0/statistics/{name}");
        run(inside(&self.namespace(node), "cat").arg(path)).trim().parse().expect("a number")
    }

    /// The value of a metric of a node. 0: the metric is missing.
    pub fn metric(&self, node: usize, name: &str) -> u64 {
        let text = output(inside(&self.namespace(node), "curl").args(["-s", "http://127.0.0.1:5051/metrics"]));
        let text = String::from_utf8_lossy(&text.stdout).into_owned();
        let line = text.lines().find(|line| line.split(' ').next() == Some(name));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or(0)
    }

    /// Waits until every running node lists all members.
    pub fn wait_until_formed(&self) {
        let known =
            self.nodes.iter().filter(|node| node.known).count() as u64 + u64::from(self.topology.unreachable_members);
        for node in self.running() {
            let listed = || self.metric(node, "dray_peers");
            assert!(
                becomes_true(|| listed() == known),
                "node {node} lists {} of {known} members after 30 s; its name server: {}; its log: {}",
                listed(),
                fs::read_to_string(format!("/proc/{}/stat", self.dns.id())).unwrap_or_default(),
                fs::read_to_string(self.dir.path().join(format!("node{node}.log"))).unwrap_or_default()
            );
        }
    }

    /// Waits until no node downloads anything.
    pub fn wait_until_idle(&self) {
        for node in self.running() {
            until("fills end", || self.metric(node, "dray_downloads_in_progress") == 0);
        }
    }

    fn running(&self) -> impl Iterator<Item = usize> {
        self.all_nodes().into_iter().filter(|node| self.process(*node).is_some())
    }

    fn process(&self, node: usize) -> MutexGuard<'_, Option<Process>> {
        self.nodes[node].process.lock().expect("no test panicked with it")
    }

    fn namespace(&self, node: usize) -> String {
        format!("{}n{node}", self.name)
    }

    fn config(&self, node: usize) -> PathBuf {
        let zones: Vec<String> =
            (0..self.topology.zones.len()).map(|zone| format!("z{zone} = \"z{zone}.dray\"")).collect();
        let service = if zones.len() == 1 { "\"z0.dray\"".to_owned() } else { format!("{{ {} }}", zones.join(", ")) };
        let text = format!(
            "[dns]\nservers = [\"{DNS}:53\"]\n[[registry]]\nmatch = \"docker.io\"\nupstreams = [\"http://{UPSTREAM}\"]\n{}\n\
             [peers]\nlisten = \"0.0.0.0:5052\"\nservice = {service}\n{}\n",
            self.topology.rule, self.topology.peers
        );
        let path = self.dir.path().join(format!("node{node}.toml"));
        fs::write(&path, text).expect("the configuration is written");
        path
    }

    /// Writes the known nodes to the name server's hosts file and reloads it.
    fn update_dns(&self) {
        let mut hosts = String::new();
        for node in self.nodes.iter().filter(|node| node.known) {
            let _ = writeln!(hosts, "{} z{}.dray", node.address, node.zone);
        }
        for member in 0..self.topology.unreachable_members {
            let [high, low] = member.to_be_bytes();
            let _ = writeln!(hosts, "{} z0.dray", Ipv4Addr::new(10, 78, high, low));
        }
        fs::write(self.dir.path().join("hosts"), hosts).expect("a file");
        self.dns.signal(Signal::HUP);
    }

    fn wait_for(&self, what: &str, node: usize, url: &str) {
        until(what, || {
            output(inside(&self.namespace(node), "curl").args(["-s", "--max-time", "1", url])).status.success()
        });
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.all_nodes().into_iter().for_each(|node| self.kill(node));
        self.upstream = None;
        self.dns.kill();
        let names = output(Command::new("ip").args(["netns", "list"]));
        for line in String::from_utf8_lossy(&names.stdout).lines() {
            let name = line.split(' ').next().unwrap_or_default();
            let rest = name.strip_prefix(&self.name).unwrap_or_default();
            if rest.starts_with(|c: char| c.is_ascii_alphabetic()) {
                let _ = output(Command::new("ip").args(["netns", "delete", name]));
            }
        }
    }
}

fn start_dns(namespace: &str, dir: &Path) -> Process {
    let mut command = inside(namespace, "dnsmasq");
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    command.args(["--keep-in-foreground", "--no-resolv", "--no-hosts", "--conf-file=/dev/null", "--local-ttl=1"]);
    command.args(["--user=root", "--pid-file=", "--bind-interfaces", "--log-facility=/dev/null"]);
    command.arg(format!("--listen-address={DNS}")).arg(format!("--addn-hosts={}", dir.join("hosts").display()));
    let dns = Process::spawn(command.stdout(Stdio::null()).stderr(Stdio::null()));
    // dnsmasq installs its handler late: before that, SIGHUP would end it.
    until("the name server has started", || {
        let status = fs::read_to_string(format!("/proc/{}/status", dns.id())).unwrap_or_default();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        caught.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & 1 == 1)
    });
    dns
}

/// A namespace with one network interface, behind a port of its zone's switch.
fn host(name: &str, host: &str, zone: usize, address: Ipv4Addr, mbit: u32) {
    let (namespace, switch) = (format!("{name}{host}"), format!("{name}s{zone}"));
    ip(&["netns", "add", &namespace]);
    connect(&namespace, "eth0", &switch, &format!("p{host}"), mbit);
    bridge(&switch, &format!("p{host}"));
    within(&namespace, &["ip", "link", "set", "lo", "up"]);
    within(&namespace, &["ip", "address", "add", &format!("{address}/16"), "dev", "eth0"]);
}

fn upstream_in(zone: usize) -> Ipv4Addr {
    Ipv4Addr::from_bits(UPSTREAM.to_bits() + u32::try_from(zone).expect("few zones"))
}

/// An interface of the upstream in another zone, with an address that only this interface responds for.
fn add_upstream_card(name: &str, zone: usize, mbit: u32) {
    let (upstream, card) = (format!("{name}o"), format!("eth{zone}"));
    let switch = format!("{name}s{zone}");
    connect(&upstream, &card, &switch, "po", mbit);
    bridge(&switch, "po");
    within(&upstream, &["sh", "-c", "echo 1 >/proc/sys/net/ipv4/conf/all/arp_ignore"]);
    within(&upstream, &["ip", "address", "add", &format!("{}/32", upstream_in(zone)), "dev", &card]);
    let route = format!("10.77.{zone}.0/24");
    within(&upstream, &["ip", "route", "add", &route, "dev", &card, "src", &upstream_in(zone).to_string()]);
}

/// Requests of this host to the upstream arrive by its interface in the zone. The address is the same in all zones: peers
/// share downloads only if their rules are equal.
fn use_upstream_card(host: &str, zone: usize) {
    within(host, &["ip", "route", "add", &UPSTREAM.to_string(), "via", &upstream_in(zone).to_string()]);
}

/// A virtual cable of this speed in each direction.
fn connect(a: &str, a_end: &str, b: &str, b_end: &str, mbit: u32) {
    ip(&["link", "add", a_end, "netns", a, "type", "veth", "peer", "name", b_end, "netns", b]);
    for (namespace, end) in [(a, a_end), (b, b_end)] {
        within(namespace, &["ip", "link", "set", end, "up"]);
        let rate = format!("{mbit}mbit");
        within(
            namespace,
            &["tc", "qdisc", "add", "dev", end, "root", "tbf", "rate", &rate, "burst", "256kb", "limit", "1mb"],
        );
    }
}

fn bridge(switch: &str, port: &str) {
    within(switch, &["ip", "link", "set", port, "master", "br0"]);
}

fn ip(arguments: &[&str]) {
    run(Command::new("ip").args(arguments));
}

fn within(namespace: &str, command: &[&str]) {
    run(inside(namespace, command[0]).args(&command[1..]));
}

/// A command in a namespace.
fn inside(namespace: &str, program: &str) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", namespace, program]);
    command
}

fn sha256(file: &Path) -> String {
    let text = run(Command::new("openssl").args(["dgst", "-sha256", "-r"]).arg(file));
    format!("sha256:{}", text.split(' ').next().unwrap_or_default())
}

fn until(what: &str, done: impl FnMut() -> bool) {
    assert!(becomes_true(done), "still waiting after 30 s: {what}");
}

fn becomes_true(mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}
