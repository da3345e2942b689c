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
    match most_file_size() {
        Some(limit) if size > limit => Err(Error::new(Op::CreatePool, ErrorKind::Exhausted)
            .because(format!("{} bytes wanted, RLIMIT_FSIZE is {}", size.get(), limit.get()))),
        _ => Ok(()),
    }
}

/// How large a file of this process may be; `None` without a limit.
pub(crate) fn most_file_size() -> Option<ByteSize> {
    getrlimit(Resource::Fsize).current.map(ByteSize::from_bytes)
}

/// How much the host and the control groups that we run in can provide now.
///
/// # Errors
/// [`ErrorKind::Unsupported`] where the kernel does not say.
pub(crate) fn plain_available() -> Result<ByteSize, Error> {
    let (available, _) = available(Path::new("/")).ok_or_else(|| {
        Error::new(Op::CreatePool, ErrorKind::Unsupported)
            .because("/proc/meminfo does not say what is available")
    })?;
    Ok(available)
}

/// Refuses a size that the host, or a control group that we run in, cannot provide now.
pub(crate) fn require_available(size: ByteSize) -> Result<(), Error> {
    match available(Path::new("/")) {
        Some((available, whose)) if size > available => {
            Err(Error::new(Op::CreatePool, ErrorKind::Exhausted).because(format!(
                "{} bytes wanted, {whose} has {} available",
                size.get(),
                available.get()
            )))
        }
        _ => Ok(()),
    }
}

/// The least that anybody above us has left, and who that is. `None` where the kernel does not say:
/// then there is nothing to go by.
fn available(root: &Path) -> Option<(ByteSize, String)> {
    let read = |path: &str| fs::read_to_string(root.join(path)).ok();
    let host = meminfo_available(&read("proc/meminfo")?)?;
    let mounts = read("proc/self/mountinfo").unwrap_or_default();
    let groups = read("proc/self/cgroup").unwrap_or_default();
    let groups = groups_of(&mounts, &groups).into_iter().filter_map(|group| {
        let left = group.version.headroom(&root.join(&group.path))?;
        Some((left, format!("the control group /{}", group.path.display())))
    });
    groups.chain([(host, String::from("the host"))]).min()
}

/// The `MemAvailable` line, which is in KiB.
fn meminfo_available(meminfo: &str) -> Option<ByteSize> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.split_whitespace().next()?.parse().ok().map(ByteSize::from_kib)
}

/// A version of the memory controller: which files say what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

impl Version {
    /// What the group has left below its limit, page cache that it can give back not counted as
    /// used. `None` without a limit.
    fn headroom(self, group: &Path) -> Option<ByteSize> {
        let (limit, usage, prefix) = match self {
            Self::One => ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
            Self::Two => ("memory.max", "memory.current", ""),
        };
        let number = |file| fs::read_to_string(group.join(file)).ok()?.trim().parse::<u64>().ok();
        let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
        let counter = |name: &str| {
            let mut lines = stat.lines().filter_map(|line| line.split_once(' '));
            let found = lines.find(|(key, _)| key.strip_prefix(prefix) == Some(name));
            found.and_then(|(_, value)| value.trim().parse::<u64>().ok()).unwrap_or(0)
        };
        let cache = counter("inactive_file").saturating_add(counter("active_file"));
        let used = number(usage)?.saturating_sub(cache);
        Some(ByteSize::from_bytes(number(limit)?.saturating_sub(used)))
    }
}

/// A control group that this process is in, by its place below the root directory.
#[derive(Debug, PartialEq, Eq)]
struct Group {
    version: Version,
    path: PathBuf,
}

/// The groups of this process that may limit its memory, and all above them, from
/// `/proc/self/mountinfo` and `/proc/self/cgroup` (proc(5), cgroups(7)).
fn groups_of(mounts: &str, groups: &str) -> Vec<Group> {
    mounts.lines().filter_map(|mount| group_of(mount, groups)).flatten().collect()
}

fn group_of(mount: &str, groups: &str) -> Option<Vec<Group>> {
    let (place, kind) = mount.split_once(" - ")?;
    let mut place = place.split(' ').skip(3);
    let (root, mount_point) = (unescaped(place.next()?), unescaped(place.next()?));
    let mut kind = kind.split(' ');
    let (fs_type, options) = (kind.next()?, kind.nth(1)?);
    let version = match fs_type {
        "cgroup2" => Version::Two,
        "cgroup" if options.split(',').any(|option| option == "memory") => Version::One,
        _ => return None,
    };
    let path = groups.lines().find_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        let ours = match version {
            Version::Two => controllers.is_empty(),
            Version::One => controllers.split(',').any(|controller| controller == "memory"),
        };
        ours.then_some(path)
    })?;
    let top = Path::new(mount_point.trim_start_matches('/'));
    let below = Path::new(path).strip_prefix(&root).ok()?;
    // Joining an empty path would leave a slash at the end.
    let group: PathBuf = top.components().chain(below.components()).collect();
    let all = group.ancestors().take_while(|path| path.starts_with(top));
    Some(all.map(|path| Group { version, path: path.to_owned() }).collect())
}

/// Spaces, tabs, newlines and backslashes are a backslash and three octal digits in mountinfo.
fn unescaped(field: &str) -> String {
    let mut parts = field.split('\\');
    let mut out = String::from(parts.next().unwrap_or_default());
    for part in parts {
        let code = part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(code) => {
                out.push(char::from(code));
                out.push_str(&part[3..]);
            }
            None => {
                out.push('\\');
                out.push_str(part);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIFIED: &str = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n";
    const HYBRID: &str = "30 24 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                          31 24 0:27 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n\
                          32 24 0:28 / /sys/fs/cgroup/cpu rw shared:9 - cgroup cgroup rw,cpu\n";

    fn paths(mounts: &str, groups: &str) -> Vec<(Version, String)> {
        let all = groups_of(mounts, groups).into_iter();
        all.map(|group| (group.version, group.path.display().to_string())).collect()
    }

    #[test]
    fn finds_the_group_and_all_above_it() {
        assert_eq!(
            paths(UNIFIED, "0::/user.slice/a\n"),
            [
                (Version::Two, "sys/fs/cgroup/user.slice/a".into()),
                (Version::Two, "sys/fs/cgroup/user.slice".into()),
                (Version::Two, "sys/fs/cgroup".into()),
            ]
        );
    }

    #[test]
    fn finds_both_versions_side_by_side() {
        let groups = "5:cpu,cpuacct:/c\n4:memory:/box\n0::/\n";
        assert_eq!(
            paths(HYBRID, groups),
            [
                (Version::Two, "sys/fs/cgroup/unified".into()),
                (Version::One, "sys/fs/cgroup/memory/box".into()),
                (Version::One, "sys/fs/cgroup/memory".into()),
            ]
        );
        assert_eq!(paths("nonsense\n- - -\n", groups), []);
    }

    #[test]
    fn names_are_unescaped() {
        assert_eq!(unescaped("/a\\040b\\134x2d\\"), "/a b\\x2d\\");
        let mount = "31 24 0:27 /\\134x2d /sys/fs/a\\040b rw - cgroup2 cgroup2 rw\n";
        assert_eq!(
            paths(mount, "0::/\\x2d/y\n"),
            [(Version::Two, "sys/fs/a b/y".into()), (Version::Two, "sys/fs/a b".into())]
        );
    }

    #[test]
    fn a_group_mounted_from_further_down_is_found_from_there() {
        let mount = "31 24 0:27 /docker/x /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
        assert_eq!(
            paths(mount, "4:memory:/docker/x/y\n"),
            [
                (Version::One, "sys/fs/cgroup/memory/y".into()),
                (Version::One, "sys/fs/cgroup/memory".into()),
            ]
        );
        assert_eq!(paths(mount, "4:memory:/elsewhere\n"), []);
    }

    #[test]
    #[cfg_attr(miri, ignore = "writes files")]
    fn the_narrowest_limit_counts() {
        let root = std::env::temp_dir().join(format!("gmem-memory-{}", std::process::id()));
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("proc/meminfo", "MemTotal:  100 kB\nMemAvailable:   90 kB\n");
        let host = (ByteSize::from_kib(90), String::from("the host"));
        assert_eq!(available(&root), Some(host.clone()));

        write("proc/self/mountinfo", UNIFIED);
        write("proc/self/cgroup", "0::/a/b\n");
        write("sys/fs/cgroup/a/b/memory.max", "max\n");
        write("sys/fs/cgroup/a/b/memory.current", "1\n");
        assert_eq!(available(&root), Some(host));

        write("sys/fs/cgroup/a/memory.max", "10000\n");
        write("sys/fs/cgroup/a/memory.current", "9000\n");
        write("sys/fs/cgroup/a/memory.stat", "anon 5\ninactive_file 300\nactive_file 200\n");
        let group = String::from("the control group /sys/fs/cgroup/a");
        assert_eq!(available(&root), Some((ByteSize::from_bytes(1500), group)));

        write("proc/self/mountinfo", HYBRID);
        write("proc/self/cgroup", "4:memory:/v1\n0::/\n");
        write("sys/fs/cgroup/memory/v1/memory.limit_in_bytes", "5000\n");
        write("sys/fs/cgroup/memory/v1/memory.usage_in_bytes", "4990\n");
        write("sys/fs/cgroup/memory/v1/memory.stat", "inactive_file 1\ntotal_inactive_file 7\n");
        let group = String::from("the control group /sys/fs/cgroup/memory/v1");
        assert_eq!(available(&root), Some((ByteSize::from_bytes(17), group)));
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    #[cfg_attr(miri, ignore = "reads /proc")]
    fn a_page_is_to_be_had_and_an_exbibyte_is_not() {
        assert_eq!(require_available(ByteSize::from_pages(1)), Ok(()));
        let error = require_available(ByteSize::from_mib(1 << 40)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Exhausted);
    }
}
