//! How much memory the host can still commit to us.
//!
//! Committing more than there is does not fail: the kernel hands out pages until it has to kill
//! somebody. So it is asked first. The answer can be out of date a moment later; it keeps a typing
//! error or a wrong unit from taking the machine down.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::{Resource, getrlimit};

use crate::addr::ByteSize;
use crate::error::{Error, ErrorKind, Op};

/// Refuses a file that the process may not make that large: the kernel would send `SIGXFSZ`.
pub(crate) fn require_file_size(size: ByteSize) -> Result<(), Error> {
    match getrlimit(Resource::Fsize).current {
        Some(limit) if size.get() > limit => Err(Error::new(Op::CreatePool, ErrorKind::Exhausted)
            .because(format!("{} bytes wanted, RLIMIT_FSIZE is {limit}", size.get()))),
        _ => Ok(()),
    }
}

/// Refuses a size that the host, or the control group that we run in, cannot provide now.
pub(crate) fn require_available(size: ByteSize) -> Result<(), Error> {
    match available() {
        Some(available) if size > available => {
            Err(Error::new(Op::CreatePool, ErrorKind::Exhausted).because(format!(
                "{} bytes wanted, the host has {} available",
                size.get(),
                available.get()
            )))
        }
        _ => Ok(()),
    }
}

/// `None` where the kernel does not say: then there is nothing to go by.
fn available() -> Option<ByteSize> {
    let host = meminfo_available(&fs::read_to_string("/proc/meminfo").ok()?)?;
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let group = unified_group(&groups).map_or_else(Vec::new, |group| headrooms(&group));
    group.into_iter().chain([host]).min()
}

/// The `MemAvailable` line, which is in KiB.
fn meminfo_available(meminfo: &str) -> Option<ByteSize> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.split_whitespace().next()?.parse().ok().map(ByteSize::from_kib)
}

/// Where the version 2 control group of this process is.
fn unified_group(groups: &str) -> Option<PathBuf> {
    let path = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(Path::new("/sys/fs/cgroup").join(path))
}

/// What each group from here to the root has left below its limit.
fn headrooms(group: &Path) -> Vec<ByteSize> {
    let read = |path: PathBuf| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    group
        .ancestors()
        .take_while(|group| group.starts_with("/sys/fs/cgroup"))
        .filter_map(|group| {
            let limit = read(group.join("memory.max"))?;
            let used = read(group.join("memory.current"))?;
            Some(ByteSize::from_bytes(limit.saturating_sub(used)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_kernel_prints() {
        let meminfo = "MemTotal:  100 kB\nMemAvailable:   7 kB\n";
        assert_eq!(meminfo_available(meminfo), Some(ByteSize::from_kib(7)));
        assert_eq!(meminfo_available("MemTotal: 1 kB\n"), None);
        let groups = "1:cpu:/x\n0::/user.slice/a\n";
        assert_eq!(unified_group(groups), Some(PathBuf::from("/sys/fs/cgroup/user.slice/a")));
        assert_eq!(unified_group("1:memory:/x\n"), None);
    }

    #[test]
    #[cfg_attr(miri, ignore = "reads /proc")]
    fn a_page_is_to_be_had_and_an_exbibyte_is_not() {
        assert_eq!(require_available(ByteSize::from_pages(1)), Ok(()));
        let error = require_available(ByteSize::from_mib(1 << 40)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Exhausted);
    }
}
