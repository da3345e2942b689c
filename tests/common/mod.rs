//! For tests that need something of the host: run, or skip aloud.
//!
//! ```ignore
//! mod common;
//! use common::Capability;
//!
//! #[test]
//! fn views_fault() {
//!     if !common::require(Capability::Uffd) {
//!         return;
//!     }
//!     ...
//! }
//! ```

pub(crate) mod names;
pub(crate) mod probe;

use std::env;
use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::PathBuf;
use std::thread;

/// What a host may or may not offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Capability {
    /// userfaultfd with the SIGBUS feature, on shared memory files.
    Uffd,
    /// `/dev/kvm` can be opened.
    Kvm,
    /// Huge pages of 2 MiB: the reserved pool may be enlarged and made smaller.
    Hugetlb,
    /// Huge pages of 1 GiB: one can be had. Whether it can is found out by trying.
    Hugetlb1G,
    /// Transparent huge pages in shared memory files: may be switched on and off.
    Thp,
    /// The kernel knows of NUMA nodes, be it one.
    Numa,
    /// Some GiB of addresses may be locked.
    Mlock,
    /// A page of memory may be made to fail.
    Hwpoison,
    /// io_uring.
    Uring,
}

impl Capability {
    pub(crate) const ALL: [Self; 9] = [
        Self::Uffd,
        Self::Kvm,
        Self::Hugetlb,
        Self::Hugetlb1G,
        Self::Thp,
        Self::Numa,
        Self::Mlock,
        Self::Hwpoison,
        Self::Uring,
    ];

    /// As in `GMEM_REQUIRE`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Uffd => "uffd",
            Self::Kvm => "kvm",
            Self::Hugetlb => "hugetlb",
            Self::Hugetlb1G => "hugetlb1g",
            Self::Thp => "thp",
            Self::Numa => "numa",
            Self::Mlock => "mlock",
            Self::Hwpoison => "hwpoison",
            Self::Uring => "uring",
        }
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Whether the host offers this. The caller returns at once if not: its skip has then been printed
/// and noted, and it is counted as skipped.
///
/// # Panics
/// If the host does not offer it, but `GMEM_REQUIRE` names it.
#[must_use]
pub(crate) fn require(capability: Capability) -> bool {
    settle(capability, probe::probe(capability))
}

/// [`require`], for something that a probe has found or not found.
#[must_use]
#[expect(clippy::panic, reason = "a test that may not be skipped fails")]
pub(crate) fn settle(capability: Capability, found: Result<(), String>) -> bool {
    let required = env::var("GMEM_REQUIRE").unwrap_or_default();
    match decide(capability, found, &required) {
        Decision::Run => {
            note(&format!("HAVE\t{capability}"));
            true
        }
        Decision::Skip(why) => {
            println!("SKIP {capability}: {why}");
            note(&format!("LACK\t{capability}\t{why}"));
            note(&format!("SKIP\t{capability}\t{why}\t{}", this_test()));
            false
        }
        Decision::Fail(why) => panic!("{why}"),
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    Run,
    Skip(String),
    Fail(String),
}

/// What to do about a capability that a probe found or did not find.
pub(crate) fn decide(
    capability: Capability,
    found: Result<(), String>,
    required: &str,
) -> Decision {
    // Found or not: a misspelt name requires nothing, which nobody would notice.
    let required = match required_capabilities(required) {
        Ok(required) => required.contains(&capability),
        Err(unknown) => return Decision::Fail(unknown),
    };
    match found {
        Ok(()) => Decision::Run,
        Err(why) if required => {
            Decision::Fail(format!("GMEM_REQUIRE names {capability}, but: {}", one_line(&why)))
        }
        Err(why) => Decision::Skip(one_line(&why)),
    }
}

/// The steps among the names are the business of `cargo xtask test`.
fn required_capabilities(list: &str) -> Result<Vec<Capability>, String> {
    let names = names::parse_required(list)?;
    Ok(Capability::ALL.into_iter().filter(|it| names.contains(&it.name())).collect())
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Appends to the log that `cargo xtask test` reads. One write per line, so that the lines of
/// tests that run at the same time stay whole.
#[expect(clippy::panic, reason = "a skip that is not in the log would be counted as a pass")]
fn note(line: &str) {
    let Some(log) = env::var_os("GMEM_SKIP_LOG").map(PathBuf::from) else { return };
    let append = || -> io::Result<()> {
        let mut file = OpenOptions::new().append(true).create(true).open(&log)?;
        file.write_all(format!("{line}\n").as_bytes())
    };
    if let Err(error) = append() {
        panic!("GMEM_SKIP_LOG {}: {error}", log.display());
    }
}

/// The test that is running: its file and its path in there. libtest names threads after tests,
/// except where it runs one on the main thread; nextest says it in the environment.
fn this_test() -> String {
    let thread = thread::current().name().filter(|&name| name != "main").map(String::from);
    let name = thread.or_else(|| env::var("NEXTEST_TEST_NAME").ok());
    let name = name.unwrap_or_else(|| format!("process {}", std::process::id()));
    format!("{}::{}", env!("CARGO_CRATE_NAME"), name)
}
