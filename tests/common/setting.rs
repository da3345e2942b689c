//! Host settings that a test changes for as long as it runs.

use std::fs;

pub(crate) const NR_HUGEPAGES: &str = "/proc/sys/vm/nr_hugepages";
pub(crate) const SHMEM_ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// A host setting that is put back when the test ends, however it ends. Only one test of all
/// processes holds one at a time.
pub(crate) struct Setting {
    path: &'static str,
    before: String,
    _lock: fs::File,
}

impl Setting {
    pub(crate) fn set(path: &'static str, value: &str) -> Self {
        let lock = fs::File::open(path).unwrap();
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
        let text = fs::read_to_string(path).unwrap();
        let before = match text.split_once('[').and_then(|(_, rest)| rest.split_once(']')) {
            Some((word, _)) => word.to_owned(),
            None => text.trim().to_owned(),
        };
        fs::write(path, value).unwrap();
        Self { path, before, _lock: lock }
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        let restored = fs::write(self.path, &self.before);
        assert!(restored.is_ok() || std::thread::panicking(), "{} not restored", self.path);
    }
}
