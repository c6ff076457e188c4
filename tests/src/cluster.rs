//! Several drays, each in a network namespace of its own behind a link of a given speed, with an origin
//! and a name server, in one zone or several.

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

/// What the network looks like. Speeds in Mbit/s.
#[derive(Clone)]
pub struct Shape {
    /// Nodes in each zone.
    pub zones: Vec<usize>,
    pub node: u32,
    pub upstream: u32,
    /// Between each zone and the others.
    pub between_zones: u32,
    /// A node that is slower.
    pub slow: Option<(usize, u32)>,
    /// Members of the first zone that DNS knows and nobody else does.
    pub strangers: u16,
    /// More for the `[peers]` table.
    pub peers: &'static str,
    /// More for the rule of the origin.
    pub rule: &'static str,
    /// Whether the origin has a way into each zone of its own, rather than being in the first zone.
    pub apart: bool,
}

/// A running cluster; everything of it goes when it is dropped.
pub struct Cluster {
    shape: Shape,
    name: String,
    nodes: Vec<Node>,
    upstream: Option<Process>,
    dns: Process,
    dir: tempfile::TempDir,
}

/// One node, whether its process runs or not.
struct Node {
    zone: usize,
    address: Ipv4Addr,
    process: Mutex<Option<Process>>,
    known: bool,
}

/// A body as a client got it.
#[derive(Clone, Debug)]
pub struct Pulled {
    pub seconds: f64,
    pub status: u16,
    /// The digest of what came, where the whole came.
    pub digest: Option<String>,
}

const DNS: Ipv4Addr = Ipv4Addr::new(10, 77, 255, 53);
const ORIGIN: Ipv4Addr = Ipv4Addr::new(10, 77, 254, 1);

impl Default for Shape {
    fn default() -> Self {
        Self {
            zones: vec![8],
            node: 400,
            upstream: 200,
            between_zones: 1000,
            slow: None,
            strangers: 0,
            peers: "",
            rule: "",
            apart: false,
        }
    }
}

/// Why there can be no clusters here; a reason to skip a test, but not where tests must not be skipped.
pub fn unavailable() -> Option<String> {
    let tried = output(Command::new("unshare").args(["--net", "--mount", "true"]));
    let why = (!tried.status.success()).then(|| "network namespaces are not allowed here (root is needed)".to_owned());
    assert!(why.is_none() || std::env::var_os("CI").is_none(), "{why:?}");
    why
}

impl Cluster {
    /// Starts the network, the name server and the origin, which has `www` under `dir`; then all nodes.
    pub fn start(shape: Shape, dir: tempfile::TempDir) -> Self {
        Self::start_without(shape, dir, &[])
    }

    /// The same without these nodes, of which nobody knows yet.
    pub fn start_without(shape: Shape, dir: tempfile::TempDir, later: &[usize]) -> Self {
        let mut cluster = Self::without_nodes(shape, dir);
        let now: Vec<usize> = cluster.everybody().into_iter().filter(|node| !later.contains(node)).collect();
        now.iter().for_each(|node| cluster.nodes[*node].known = true);
        cluster.tell_dns();
        now.into_iter().for_each(|node| cluster.launch(node));
        cluster.wait_until_formed();
        cluster
    }

    fn without_nodes(shape: Shape, dir: tempfile::TempDir) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("dray{}x{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        for zone in 0..shape.zones.len() {
            let switch = format!("{name}s{zone}");
            ip(&["netns", "add", &switch]);
            within(&switch, &["ip", "link", "add", "br0", "type", "bridge"]);
            within(&switch, &["ip", "link", "set", "br0", "up"]);
            within(&switch, &["ip", "link", "set", "lo", "up"]);
            if zone > 0 {
                connect(&format!("{name}s0"), &format!("z{zone}"), &switch, "z0", shape.between_zones);
                bridge(&format!("{name}s0"), &format!("z{zone}"));
                bridge(&switch, "z0");
            }
        }
        let first = format!("{name}s0");
        within(&first, &["ip", "address", "add", &format!("{DNS}/16"), "dev", "br0"]);
        host(&name, "o", 0, ORIGIN, shape.upstream);
        if shape.apart {
            (1..shape.zones.len()).for_each(|zone| second_card(&name, zone, shape.upstream));
        }
        let mut nodes = Vec::new();
        for (zone, count) in shape.zones.iter().enumerate() {
            for _ in 0..*count {
                let nth = nodes.len();
                let [zone_byte, nth_byte] = [zone, nth + 1].map(|n| u8::try_from(n).expect("a small cluster"));
                let address = Ipv4Addr::new(10, 77, zone_byte, nth_byte);
                let speed = shape.slow.filter(|(slow, _)| *slow == nth).map_or(shape.node, |(_, speed)| speed);
                host(&name, &format!("n{nth}"), zone, address, speed);
                nodes.push(Node { zone, address, process: Mutex::default(), known: false });
            }
        }
        fs::create_dir_all(dir.path().join("www")).expect("a directory");
        fs::write(dir.path().join("hosts"), "").expect("a file");
        let dns = start_dns(&first, dir.path());
        let mut cluster = Self { shape, name, nodes, upstream: None, dns, dir };
        cluster.start_upstream();
        cluster
    }

    /// The origin is there again.
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
        self.wait_for("the origin listens", 0, &format!("http://{ORIGIN}/v2/"));
    }

    pub fn stop_upstream(&mut self) {
        self.upstream = None;
    }

    /// Body bytes that the origin has sent.
    pub fn upstream_bytes(&self) -> u64 {
        let log = fs::read_to_string(self.dir.path().join("access.log")).unwrap_or_default();
        log.lines().filter_map(|line| line.split(' ').nth(1)?.parse::<u64>().ok()).sum()
    }

    /// All nodes, whether they run or not.
    pub fn everybody(&self) -> Vec<usize> {
        (0..self.nodes.len()).collect()
    }

    /// Starts a node that DNS knows of from now on.
    pub fn join(&mut self, node: usize) {
        self.nodes[node].known = true;
        self.tell_dns();
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

    /// A node answers nothing any more, and nobody is told.
    pub fn freeze(&self, node: usize) {
        if let Some(process) = &*self.process(node) {
            process.signal(Signal::STOP);
        }
    }

    /// Stops a node as an orchestrator does, and waits for its end.
    pub fn stop(&self, node: usize) {
        let stopped = self.process(node).take();
        if let Some(mut process) = stopped {
            process.signal(Signal::TERM);
            process.wait();
        }
    }

    /// Cuts a node off from everybody, or not any more.
    pub fn cut(&self, node: usize) {
        self.link(node, "down");
    }

    pub fn heal(&self, node: usize) {
        self.link(node, "up");
    }

    fn link(&self, node: usize, state: &str) {
        let switch = format!("{}s{}", self.name, self.nodes[node].zone);
        within(&switch, &["ip", "link", "set", &format!("pn{node}"), state]);
    }

    /// Forgets what a node has.
    pub fn clear(&self, node: usize) {
        let _ = fs::remove_dir_all(self.cache(node));
    }

    /// The node that keeps a blob under its name.
    pub fn owner(&self, path: &str) -> usize {
        let digest = path.split(['/', '?']).find_map(|part| part.strip_prefix("sha256:")).expect("a blob's path");
        let file = format!("v1/blobs/sha256/{}/{digest}", &digest[..2]);
        let keeps = |node: &usize| self.cache(*node).join(&file).exists();
        self.everybody().into_iter().find(keeps).expect("somebody owns it")
    }

    pub fn cache(&self, node: usize) -> PathBuf {
        self.dir.path().join(format!("cache{node}"))
    }

    /// A client on a node asks its dray for a path.
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

    /// The seconds that a client on each of these nodes takes, all at once, throwing the body away.
    pub fn race(&self, nodes: &[usize], path: &str) -> Vec<f64> {
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

    /// The process of a node that runs.
    pub fn pid(&self, node: usize) -> u32 {
        self.process(node).as_ref().expect("it runs").id()
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

    /// The value of a metric of a node; 0 if it is not there.
    pub fn metric(&self, node: usize, name: &str) -> u64 {
        let text = output(inside(&self.namespace(node), "curl").args(["-s", "http://127.0.0.1:5051/metrics"]));
        let text = String::from_utf8_lossy(&text.stdout).into_owned();
        let line = text.lines().find(|line| line.split(' ').next() == Some(name));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or(0)
    }

    /// Waits until every running node knows all the others.
    pub fn wait_until_formed(&self) {
        let known = self.nodes.iter().filter(|node| node.known).count() as u64 + u64::from(self.shape.strangers);
        for node in self.running() {
            let knows = || self.metric(node, "dray_peers");
            assert!(
                comes_true(|| knows() == known),
                "node {node} knows {} of {known} members after 30 s; its name server: {}; its log: {}",
                knows(),
                fs::read_to_string(format!("/proc/{}/stat", self.dns.id())).unwrap_or_default(),
                fs::read_to_string(self.dir.path().join(format!("node{node}.log"))).unwrap_or_default()
            );
        }
    }

    /// Waits until no node fetches anything.
    pub fn wait_until_idle(&self) {
        for node in self.running() {
            until("fills end", || self.metric(node, "dray_fills{state=\"running\"}") == 0);
        }
    }

    fn running(&self) -> impl Iterator<Item = usize> {
        self.everybody().into_iter().filter(|node| self.process(*node).is_some())
    }

    fn process(&self, node: usize) -> MutexGuard<'_, Option<Process>> {
        self.nodes[node].process.lock().expect("no test panicked with it")
    }

    fn namespace(&self, node: usize) -> String {
        format!("{}n{node}", self.name)
    }

    fn config(&self, node: usize) -> PathBuf {
        let zones: Vec<String> =
            (0..self.shape.zones.len()).map(|zone| format!("z{zone} = \"z{zone}.dray\"")).collect();
        let service = if zones.len() == 1 { "\"z0.dray\"".to_owned() } else { format!("{{ {} }}", zones.join(", ")) };
        let upstream = self.upstream_of(self.nodes[node].zone);
        let text = format!(
            "[dns]\nservers = [\"{DNS}:53\"]\n[[registry]]\nmatch = \"docker.io\"\nupstreams = [\"http://{upstream}\"]\n{}\n\
             [peers]\nlisten = \"0.0.0.0:5052\"\nservice = {service}\n{}\n",
            self.shape.rule, self.shape.peers
        );
        let path = self.dir.path().join(format!("node{node}.toml"));
        fs::write(&path, text).expect("the configuration is written");
        path
    }

    /// The address of the origin for nodes of a zone.
    fn upstream_of(&self, zone: usize) -> Ipv4Addr {
        if self.shape.apart { upstream_in(zone) } else { ORIGIN }
    }

    /// Tells the name server which nodes are known.
    fn tell_dns(&self) {
        let mut hosts = String::new();
        for node in self.nodes.iter().filter(|node| node.known) {
            let _ = writeln!(hosts, "{} z{}.dray", node.address, node.zone);
        }
        for stranger in 0..self.shape.strangers {
            let [high, low] = stranger.to_be_bytes();
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
        self.everybody().into_iter().for_each(|node| self.kill(node));
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
    // Before it knows what SIGHUP means it would end by it.
    until("the name server has started", || {
        let status = fs::read_to_string(format!("/proc/{}/status", dns.id())).unwrap_or_default();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        caught.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & 1 == 1)
    });
    dns
}

/// A namespace with one card, behind a port of its zone's switch.
fn host(name: &str, host: &str, zone: usize, address: Ipv4Addr, mbit: u32) {
    let (namespace, switch) = (format!("{name}{host}"), format!("{name}s{zone}"));
    ip(&["netns", "add", &namespace]);
    connect(&namespace, "eth0", &switch, &format!("p{host}"), mbit);
    bridge(&switch, &format!("p{host}"));
    within(&namespace, &["ip", "link", "set", "lo", "up"]);
    within(&namespace, &["ip", "address", "add", &format!("{address}/16"), "dev", "eth0"]);
}

fn upstream_in(zone: usize) -> Ipv4Addr {
    Ipv4Addr::from_bits(ORIGIN.to_bits() + u32::try_from(zone).expect("few zones"))
}

/// A card of the origin in another zone, with an address that only this card answers for.
fn second_card(name: &str, zone: usize, mbit: u32) {
    let (upstream, card) = (format!("{name}o"), format!("eth{zone}"));
    let switch = format!("{name}s{zone}");
    connect(&upstream, &card, &switch, "po", mbit);
    bridge(&switch, "po");
    within(&upstream, &["sh", "-c", "echo 1 >/proc/sys/net/ipv4/conf/all/arp_ignore"]);
    within(&upstream, &["ip", "address", "add", &format!("{}/32", upstream_in(zone)), "dev", &card]);
    let way = format!("10.77.{zone}.0/24");
    within(&upstream, &["ip", "route", "add", &way, "dev", &card, "src", &upstream_in(zone).to_string()]);
}

/// A cable of this speed in each direction.
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
    assert!(comes_true(done), "still waiting after 30 s: {what}");
}

fn comes_true(mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}
