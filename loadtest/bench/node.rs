//! A pull on a small node: containerd and dray share a disk of 125 MB/s, dray has 256 MiB.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use dray_tests::containerd::{Containerd, Version};
use dray_tests::dray::Start;
use dray_tests::image::Image;
use dray_tests::process::{output, run};
use dray_tests::registry::Registry;

use super::rig::{Rig, median, row};

const RATE: u64 = 125_000_000;
const MEMORY: u64 = 256 << 20;
const ROUNDS: usize = 3;

pub(crate) async fn pull(rig: &Rig) {
    let Some(disk) = SlowDisk::new(rig.dir.path()) else {
        return row(
            "containerd's pull on a slow disk",
            "skipped",
            "needs root, loop devices and blkio of cgroup v1",
            "",
        );
    };
    let image = Image::new(1, &[150_000_000, 150_000_000, 150_000_000]);
    let registry = Registry::open().await;
    registry.push("library/app", "1", &image).await;
    let (mut directs, mut pulls, mut ratios) = (vec![], vec![], vec![]);
    for _ in 0..ROUNDS {
        let direct = {
            let containerd = Containerd::start_in(Version::V1, &disk.dir).await;
            let hosts = containerd.hosts_dir().join("_default");
            fs::create_dir_all(&hosts).unwrap();
            let text = format!("[host.\"{}\"]\n  capabilities = [\"pull\", \"resolve\"]\n", registry.url());
            fs::write(hosts.join("hosts.toml"), text).unwrap();
            disk.settle();
            timed(&containerd)
        };
        let pull = {
            let containerd = Containerd::start_in(Version::V1, &disk.dir).await;
            let cache = disk.dir.join("cache");
            let dray = Start::with_upstream("docker.io", &registry.url()).disk("2GiB").cache(&cache).run();
            limit_memory(dray.id());
            containerd.use_mirror(&dray);
            disk.settle();
            let seconds = timed(&containerd);
            drop(dray);
            fs::remove_dir_all(cache).unwrap();
            seconds
        };
        directs.push(direct);
        pulls.push(pull);
        ratios.push(pull / direct);
    }
    row(
        "containerd's pull, 450 MB, disk 125 MB/s, 256 MiB",
        &format!("{:.2} s", median(&pulls)),
        &format!("{:.2} x direct ({:.2} s)", median(&ratios), median(&directs)),
        "<= 1.1 x",
    );
}

fn timed(containerd: &Containerd) -> f64 {
    let started = Instant::now();
    containerd.pull_by("overlayfs", "docker.io/library/app:1").unwrap();
    started.elapsed().as_secs_f64()
}

fn limit_memory(pid: u32) {
    let group = Path::new("/sys/fs/cgroup/memory/dray-bench");
    fs::create_dir_all(group).unwrap();
    fs::write(group.join("memory.limit_in_bytes"), MEMORY.to_string()).unwrap();
    fs::write(group.join("cgroup.procs"), pid.to_string()).unwrap();
}

/// A file system on a loop device with a rate limit of the kernel.
struct SlowDisk {
    device: String,
    dir: PathBuf,
}

impl SlowDisk {
    fn new(parent: &Path) -> Option<Self> {
        let throttle = Path::new("/sys/fs/cgroup/blkio");
        if !rustix::process::geteuid().is_root() || !throttle.join("blkio.throttle.write_bps_device").exists() {
            return None;
        }
        let (file, dir) = (parent.join("disk"), parent.join("slow"));
        fs::File::create(&file).unwrap().set_len(6 << 30).unwrap();
        let made = output(Command::new("losetup").args(["--find", "--show", "--direct-io=on"]).arg(&file));
        let device = String::from_utf8(made.stdout).unwrap().trim().to_owned();
        let disk = made.status.success().then_some(Self { device, dir })?;
        run(Command::new("mkfs.ext4").args(["-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", &disk.device]));
        fs::create_dir_all(&disk.dir).unwrap();
        run(Command::new("mount").arg(&disk.device).arg(&disk.dir));
        let number = disk.device.strip_prefix("/dev/loop").unwrap();
        for direction in ["read", "write"] {
            let file = throttle.join(format!("blkio.throttle.{direction}_bps_device"));
            fs::write(file, format!("7:{number} {RATE}")).unwrap();
        }
        Some(disk)
    }

    /// Writes out everything of an earlier round.
    fn settle(&self) {
        run(&mut Command::new("sync"));
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        let _ = output(Command::new("umount").arg("-l").arg(&self.dir));
        let _ = output(Command::new("losetup").args(["-d", &self.device]));
    }
}
