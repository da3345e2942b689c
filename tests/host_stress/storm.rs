//! Signals that interrupt every system call, and children that must have none of the memory.

// UNSAFETY: signal handlers, signals to threads, and fork.
#![expect(unsafe_code, reason = "no safe interface to signals and fork is among the dependencies")]

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;
use std::{fs, mem, ptr};

use gmem::HostView;

use super::{PAGE, Random};

static NR_SIGNALS: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(_: libc::c_int) {
    NR_SIGNALS.fetch_add(1, Ordering::Relaxed);
}

pub(crate) fn nr_signals() -> u64 {
    NR_SIGNALS.load(Ordering::Relaxed)
}

/// The threads that are interrupted.
#[derive(Default)]
pub(crate) struct Storm(Mutex<Vec<libc::pthread_t>>);

impl Storm {
    /// Has calls return `EINTR`: the handler is one without `SA_RESTART`.
    pub(crate) fn begin() -> Self {
        // SAFETY: a structure of numbers and pointers, all of which may be zero.
        let mut action: libc::sigaction = unsafe { mem::zeroed() };
        action.sa_sigaction = count as extern "C" fn(libc::c_int) as usize;
        // SAFETY: the handler only adds to an atomic.
        let done = unsafe { libc::sigaction(libc::SIGUSR1, &raw const action, ptr::null_mut()) };
        assert_eq!(done, 0);
        Self::default()
    }

    /// Runs `work` out in the storm.
    pub(crate) fn exposed(&self, work: impl FnOnce()) {
        // SAFETY: takes nothing.
        let this = unsafe { libc::pthread_self() };
        self.0.lock().unwrap().push(this);
        work();
        self.0.lock().unwrap().retain(|thread| *thread != this);
    }

    pub(crate) fn rages(&self, is_over: impl Fn() -> bool) {
        let mut random = Random::new(0x5707);
        while !is_over() {
            let threads = self.0.lock().unwrap();
            for &thread in threads.iter() {
                // SAFETY: whoever is in the list lives, and takes the lock before it ends.
                assert_eq!(unsafe { libc::pthread_kill(thread, libc::SIGUSR1) }, 0);
            }
            drop(threads);
            thread::sleep(Duration::from_micros(50 + random.below(400)));
        }
    }
}

/// Addresses that no child is to have.
pub(crate) struct Secrets(Vec<usize>);

impl Secrets {
    /// All that is mapped of arenas, but for views other than these: of views that map pages anew while they are
    /// at work a child may get one that is just being mapped.
    pub(crate) fn new(strict: &[&HostView], others: &[&HostView]) -> Self {
        let base = |view: &HostView| view.hva().get();
        let len = |view: &HostView| view.size().get() as usize;
        let is_in = |view: &HostView, at: usize| (base(view)..base(view) + len(view)).contains(&at);
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let mut addresses = Vec::new();
        for line in maps.lines().filter(|line| line.contains("gmem-arena")) {
            let start = line.split('-').next().unwrap();
            let start = usize::from_str_radix(start, 16).unwrap();
            if !strict.iter().chain(others).any(|view| is_in(view, start)) {
                addresses.push(start);
            }
        }
        assert!(!addresses.is_empty(), "the pool's own mapping");
        for view in strict {
            addresses.extend((0..len(view)).step_by(16 * PAGE as usize).map(|at| base(view) + at));
        }
        Self(addresses)
    }

    /// A child that looks, and goes at once. Returns whether it has found nothing.
    pub(crate) fn fork_one(&self) -> bool {
        // SAFETY: the child makes system calls alone.
        let child = unsafe { libc::fork() };
        assert!(child >= 0, "{}", std::io::Error::last_os_error());
        if child == 0 {
            let mut found = 0;
            for &at in &self.0 {
                let at = ptr::without_provenance_mut(at);
                // SAFETY: changes nothing; fails where nothing is mapped.
                found |= i32::from(unsafe { libc::msync(at, PAGE as usize, libc::MS_ASYNC) } == 0);
            }
            // SAFETY: ends the child.
            unsafe { libc::_exit(found) };
        }
        let mut status = 0;
        loop {
            // SAFETY: waits for a child of ours.
            let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
            if waited == child {
                break;
            }
            assert_eq!(std::io::Error::last_os_error().kind(), std::io::ErrorKind::Interrupted);
        }
        libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
    }
}
