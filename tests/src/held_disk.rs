//! A disk that hangs: every open of a file below a directory blocks until this value is dropped.

use std::path::Path;

use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags};

/// The kernel requests permission from this group for each open. It gets no response until the last descriptor is
/// closed.
pub struct HeldDisk(#[expect(dead_code, reason = "closed when dropped")] Fanotify);

impl HeldDisk {
    pub fn hold(dir: &Path) -> Self {
        let flags = InitFlags::FAN_CLASS_CONTENT | InitFlags::FAN_CLOEXEC;
        let fanotify = Fanotify::init(flags, EventFFlags::O_RDONLY).expect("fanotify, as root");
        mark(&fanotify, dir);
        Self(fanotify)
    }
}

fn mark(fanotify: &Fanotify, dir: &Path) {
    // Listed first, because opens of a marked directory block.
    let entries = std::fs::read_dir(dir).expect("a directory").flatten();
    let below: Vec<_> = entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    below.iter().for_each(|dir| mark(fanotify, dir));
    let mask = MaskFlags::FAN_OPEN_PERM | MaskFlags::FAN_EVENT_ON_CHILD;
    let marked = fanotify.mark(MarkFlags::FAN_MARK_ADD, mask, nix::fcntl::AT_FDCWD, Some(dir));
    marked.unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
}
