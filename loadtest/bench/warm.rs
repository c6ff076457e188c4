//! Cached pulls of a large blob, which the kernel sends.

use dray_tests::dray::Start;

use super::rig::{ROUNDS, Rig, Server, clean, cpu_seconds, curl, curls, gigabytes, median, row};

/// Rates and costs of one side.
#[derive(Default)]
struct Side {
    rates: Vec<f64>,
    costs: Vec<f64>,
}

impl Side {
    fn measure(&mut self, pid: u32, url: &str, clients: u32) {
        let before = cpu_seconds(pid);
        let seconds = if clients == 1 { curl(url).seconds } else { curls(url, clients as usize) };
        let gigabytes = gigabytes(1.0) * f64::from(clients);
        self.costs.push((cpu_seconds(pid) - before) / gigabytes);
        self.rates.push(gigabytes / seconds);
    }

    fn show(&self) -> String {
        format!("{:.2} GB/s, {:.2} CPU s/GB", median(&self.rates), median(&self.costs))
    }
}

fn compare(what: &str, ours: &Side, nginx: &Side, bar: &str) {
    let ratio = |ours: &[f64], theirs: &[f64]| {
        let ratios: Vec<f64> = ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs.max(1e-9)).collect();
        median(&ratios)
    };
    let compared = format!(
        "{:.2} x nginx's rate, {:.2} x its cost ({})",
        ratio(&ours.rates, &nginx.rates),
        median(&ours.costs) / median(&nginx.costs),
        nginx.show()
    );
    row(what, &ours.show(), &compared, bar);
}

/// By sendfile, beside nginx's sendfile.
pub(crate) async fn plain(rig: &Rig) {
    let dray = rig.dray(Server::Fast);
    curl(&dray.url(&rig.path()));
    dray.wait_for_fills().await;
    let url = dray.url(&rig.path());
    for clients in [1, 8] {
        let (mut ours, mut nginx) = (Side::default(), Side::default());
        for _ in 0..ROUNDS * 2 {
            ours.measure(dray.id(), &url, clients);
            nginx.measure(rig.nginx.id(), &rig.url(Server::Fast), clients);
        }
        let what = if clients == 1 { "1 GiB warm, one client".into() } else { format!("{clients} clients") };
        compare(&what, &ours, &nginx, ">= 0.95 x, <= 1.3 x");
    }
    clean(dray);
}

/// Through TLS, HTTP/1.1.
pub(crate) async fn tls(rig: &Rig) {
    let (cert, key) = (rig.tls.cert.display(), rig.tls.key.display());
    let upstream = rig.nginx.url(Server::Fast as usize);
    let config = format!(
        "[tls]\ncert = \"{cert}\"\nkey = \"{key}\"\n[[registry]]\nmatch = \"docker.io\"\nupstreams = [\"{upstream}\"]\n"
    );
    let cache = tempfile::Builder::new().prefix("cache").tempdir_in(rig.dir.path()).unwrap().keep();
    let dray = Start::new(config).disk("8GiB").cache(cache).run();
    let url = format!("https://localhost:{}{}", dray.registry.port(), rig.path());
    curl(&url);
    dray.wait_for_fills().await;
    let (mut ours, mut nginx) = (Side::default(), Side::default());
    for _ in 0..ROUNDS {
        ours.measure(dray.id(), &url, 1);
        nginx.measure(rig.nginx.id(), &rig.url(Server::Tls), 1);
    }
    compare("1 GiB warm, TLS", &ours, &nginx, "cost <= 1.0 x");
    clean(dray);
}
