use std::path::Path;

use super::super::budget::NoSpace;
use super::*;
use crate::oci::Span;

fn provenance() -> Provenance {
    Provenance { rule: "*".into(), registry: "docker.io".into(), repository: "library/a".into() }
}

fn large(dir: &Path, limit: u64) -> Large {
    Large::open(&Layout::open(dir).unwrap(), limit, &Metrics::new()).unwrap()
}

fn put(large: &Large, bytes: &[u8]) -> Digest {
    let digest = Digest::of(bytes);
    let draft = large.draft(bytes.len() as u64, provenance()).unwrap();
    large.reserve(&draft.blob, bytes.len() as u64).and_then(|()| large.write(&draft.blob, bytes, 0)).unwrap();
    large.announce(&draft, &digest);
    assert!(large.get(&digest).is_some(), "found before it has its name");
    large.publish(draft, &digest).unwrap();
    digest
}

#[test]
fn blobs_survive_a_restart_with_their_provenance() {
    let dir = tempfile::tempdir().unwrap();
    let digest = put(&large(dir.path(), 1 << 20), b"hello");
    let (blob, proof) = large(dir.path(), 1 << 20).get(&digest).unwrap();
    assert_eq!((blob.len, proof), (5, Verification::Verified));
    assert_eq!(blob.provenance, Some(provenance()));
}

#[test]
fn blobs_are_unproven_after_a_machine_crash() {
    let dir = tempfile::tempdir().unwrap();
    let [first, second] = {
        let large = large(dir.path(), 1 << 20);
        [b"hello", b"world"].map(|bytes| put(&large, bytes))
    };
    fs::write(dir.path().join("v1/state"), "another-boot 0").unwrap();
    {
        let large = large(dir.path(), 1 << 20);
        let (blob, proof) = large.get(&first).unwrap();
        assert_eq!(proof, Verification::Unverified);
        large.prove(&first, &blob);
        assert_eq!(large.get(&first).unwrap().1, Verification::Verified);
    }
    // A blob that was not hashed then stays unproven.
    let large = large(dir.path(), 1 << 20);
    assert_eq!(large.get(&first).unwrap().1, Verification::Verified);
    assert_eq!(large.get(&second).unwrap().1, Verification::Unverified);
}

#[test]
fn eviction_is_lru_and_spares_blobs_with_readers() {
    let dir = tempfile::tempdir().unwrap();
    let large = large(dir.path(), 3 * (1000 + FILE_OVERHEAD));
    let [a, b, c] = [b'a', b'b', b'c'].map(|byte| put(&large, &[byte; 1000]));
    let reader = large.get(&a).unwrap();
    large.get(&b).unwrap();
    let d = put(&large, &[b'd'; 1000]);
    assert!(large.get(&c).is_none(), "least recently used");
    assert!(large.get(&a).is_some() && large.get(&b).is_some() && large.get(&d).is_some());
    let readers = [&b, &d].map(|digest| large.get(digest).unwrap());
    assert_eq!(large.draft(1000, provenance()).err(), Some(NoSpace), "everything is being read");
    drop((reader, readers));
    assert!(large.draft(1000, provenance()).is_ok());
    assert_eq!(large.draft(u64::MAX, provenance()).err(), Some(NoSpace));
}

#[test]
fn dropped_draft_frees_space_after_its_last_reader() {
    let dir = tempfile::tempdir().unwrap();
    let large = large(dir.path(), 2 * (1000 + FILE_OVERHEAD));
    let draft = large.draft(1000, provenance()).unwrap();
    large.reserve(&draft.blob, 1000).unwrap();
    let reader = draft.blob.clone();
    drop(draft);
    assert_eq!(fs::read_dir(dir.path().join("v1/fills")).unwrap().count(), 0);
    assert!(large.draft(2000, provenance()).is_err(), "still open, still counted");
    drop(reader);
    assert!(large.draft(2000, provenance()).is_ok());
}

#[test]
fn concurrent_drafts_get_distinct_space() {
    let dir = tempfile::tempdir().unwrap();
    let (blob, room) = (1 << 20, 3 << 19);
    let large = large(dir.path(), room);
    for round in 0..100 {
        let begun = std::sync::Barrier::new(16);
        let drafts: Vec<_> = std::thread::scope(|scope| {
            let draft = || {
                begun.wait();
                large.draft(blob, provenance()).ok()
            };
            let threads: Vec<_> = (0..16).map(|_| scope.spawn(draft)).collect();
            threads.into_iter().filter_map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(drafts.len() as u64, room / blob, "round {round}");
    }
}

#[test]
fn vanished_directory_is_a_miss_and_recreated() {
    let dir = tempfile::tempdir().unwrap();
    let large = large(dir.path(), 1 << 20);
    let digest = put(&large, b"hello");
    fs::remove_dir_all(dir.path().join("v1")).unwrap();
    assert!(large.get(&digest).is_none());
    let digest = put(&large, b"hello");
    assert!(large.get(&digest).is_some());
}

#[test]
fn truncated_file_is_not_served() {
    let dir = tempfile::tempdir().unwrap();
    let large = large(dir.path(), 1 << 20);
    let digest = put(&large, b"hello");
    File::options().write(true).open(large.path(&digest)).unwrap().set_len(2).unwrap();
    assert!(large.get(&digest).is_none());
}

/// A partial of `digest` with its first `bytes` bytes.
fn keep(large: &Large, digest: &Digest, bytes: u64) {
    let (draft, content) = (large.draft(bytes + 10, provenance()).unwrap(), vec![7; usize::try_from(bytes).unwrap()]);
    large.reserve(&draft.blob, bytes).and_then(|()| large.write(&draft.blob, &content, 0)).unwrap();
    large.keep_partial(digest, &"docker.io".parse().unwrap(), draft, Span { start: 0, end: bytes }.into());
}

fn take(large: &Large, digest: &Digest) -> Option<u64> {
    let partial = large.take_partial(digest, &"docker.io".parse().unwrap(), |known| *known == provenance());
    partial.map(|partial| partial.written.len())
}

#[test]
fn partials_survive_a_kill_and_an_orderly_end() {
    let dir = tempfile::tempdir().unwrap();
    let [killed, closed, crashed] = [b"killed_", b"closed_", b"crashed"].map(|name| Digest::of(name));
    let first = large(dir.path(), 1 << 20);
    keep(&first, &killed, 600);
    // A killed process drops nothing, but its lock ends.
    std::mem::forget(first);
    fs::remove_file(dir.path().join("v1/lock")).unwrap();
    let second = large(dir.path(), 1 << 20);
    assert!(second.usage().0 >= 600, "its space is counted");
    assert_eq!(take(&second, &killed), Some(600));
    keep(&second, &closed, 500);
    second.seal();
    drop(second);
    let third = large(dir.path(), 1 << 20);
    assert_eq!((take(&third, &killed), take(&third, &closed)), (None, Some(500)));
    keep(&third, &crashed, 400);
    third.seal();
    drop(third);
    fs::write(dir.path().join("v1/state"), "another-boot 0").unwrap();
    assert_eq!(take(&large(dir.path(), 1 << 20), &crashed), None, "the machine crashed");
}

#[test]
fn newest_and_largest_partial_fit_however_large_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let large = large(dir.path(), 4 * (1000 + FILE_OVERHEAD));
    let [largest, second, newest] = [b"a", b"b", b"c"].map(|name| Digest::of(name));
    keep(&large, &largest, 900);
    keep(&large, &second, 600);
    keep(&large, &newest, 500);
    assert_eq!([&largest, &second, &newest].map(|digest| take(&large, digest)), [Some(900), None, Some(500)]);
}

#[test]
fn partial_that_no_longer_fits_is_removed_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let digest = Digest::of(b"a");
    {
        let large = large(dir.path(), 1 << 20);
        keep(&large, &digest, 500);
        large.seal();
    }
    let smaller = large(dir.path(), 400 + FILE_OVERHEAD);
    assert_eq!((take(&smaller, &digest), smaller.usage().0), (None, 0));
    assert_eq!(fs::read_dir(dir.path().join("v1/fills")).unwrap().count(), 0);
}

#[test]
fn purged_partial_does_not_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let digest = Digest::of(b"a");
    {
        let large = large(dir.path(), 1 << 20);
        keep(&large, &digest, 500);
        large.seal();
        large.purge(&digest);
    }
    assert_eq!(take(&large(dir.path(), 1 << 20), &digest), None);
}
