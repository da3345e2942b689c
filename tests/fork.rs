//! What a child of the VMM has of its guests.

// UNSAFETY: a fork, whose child calls nothing but what is async-signal-safe.
#![expect(unsafe_code, reason = "std can only fork to exec")]

mod common;

use std::fs;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};

use common::Capability;
use gmem::addr::{ByteSize, Offset};
use gmem::{ArenaBacking, FolioPool, GuestMemfd, Visibility};

/// What `/proc` says of the memory and of the open files of a process that are gmem's.
fn ours(pid: libc::pid_t) -> (usize, usize) {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let files = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let is_ours = |name: &str| name.contains("gmem") && name.contains("memfd:");
    let names = files.map(|file| fs::read_link(file.path()).unwrap_or_default());
    (
        maps.lines().filter(|line| is_ours(line)).count(),
        names.filter(|name| is_ours(&name.to_string_lossy())).count(),
    )
}

#[test]
fn a_child_inherits_no_mapping_and_no_descriptor_past_exec() {
    if !common::require(Capability::Uffd) {
        return;
    }
    let size = ByteSize::from_mib(4);
    let pool = FolioPool::new(ArenaBacking::Memfd, size).unwrap();
    let memfd = GuestMemfd::builder(size).initial(Visibility::Shared).create(&pool).unwrap();
    memfd.write(Offset::new(0), &[7; 4096]).unwrap();
    let _view = memfd.map_view().unwrap();
    let lent = memfd.as_fd().try_clone_to_owned().unwrap();
    let (nr_mappings, nr_files) = ours(std::process::id() as libc::pid_t);
    assert!(nr_mappings >= 2 && nr_files >= 3, "{nr_mappings}, {nr_files}");

    // SAFETY: the child waits to be killed, and does nothing else.
    let child = unsafe { libc::fork() };
    if child == 0 {
        loop {
            // SAFETY: takes nothing; async-signal-safe.
            unsafe { libc::pause() };
        }
    }
    let inherited = ours(child);
    // SAFETY: takes no pointers; a child that nobody has waited for.
    assert_eq!(unsafe { libc::kill(child, libc::SIGKILL) }, 0);
    // SAFETY: as above; the status is not asked for.
    assert_eq!(unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) }, child);
    assert_eq!(inherited, (0, nr_files), "as design/host.md says");

    let mut other = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
    // It has called exec: `spawn` waits for that.
    assert_eq!(ours(other.id() as libc::pid_t), (0, 0));
    drop(other.stdin.take());
    assert!(other.wait().unwrap().success());
    drop(lent);
}
