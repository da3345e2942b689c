//! Transparent huge pages of shared memory: what the host allows, and what it really gave.

use std::fs;

use crate::addr::{ByteSize, Hva};
use crate::error::{Error, ErrorKind, Op};

const SHMEM_ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// Whether `madvise(MADV_HUGEPAGE)` has an effect on a memfd.
///
/// # Errors
/// [`ErrorKind::MissingCapability`] names the setting and what it says.
pub(crate) fn require_shmem() -> Result<(), Error> {
    let missing =
        |why: String| Error::new(Op::CreatePool, ErrorKind::MissingCapability).because(why);
    let text = fs::read_to_string(SHMEM_ENABLED)
        .map_err(|e| missing(format!("transparent huge pages: {SHMEM_ENABLED}: {e}")))?;
    match selected(&text) {
        Some("always" | "within_size" | "advise" | "force") => Ok(()),
        Some(other) => Err(missing(format!(
            "transparent huge pages: {SHMEM_ENABLED} says `{other}`, `advise` is needed"
        ))),
        None => Err(missing(format!("transparent huge pages: {SHMEM_ENABLED} is unreadable"))),
    }
}

/// The word in brackets.
fn selected(text: &str) -> Option<&str> {
    text.split_once('[')?.1.split_once(']').map(|(word, _)| word)
}

/// How much of the mapping at `start` the kernel maps by huge entries, from its own counter
/// (`ShmemPmdMapped` in smaps). Zero where it cannot be read.
pub(crate) fn huge_mapped(start: Hva) -> ByteSize {
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    ByteSize::from_kib(huge_mapped_kib(&smaps, start.get()).unwrap_or(0))
}

fn huge_mapped_kib(smaps: &str, start: usize) -> Option<u64> {
    let head = format!("{start:x}-");
    let mut lines = smaps.lines().skip_while(|line| !line.starts_with(&head));
    let line = lines.find(|line| line.starts_with("ShmemPmdMapped:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_bracketed_word() {
        assert_eq!(selected("always within_size advise [never] deny force\n"), Some("never"));
        assert_eq!(selected("no brackets"), None);
    }

    #[test]
    fn finds_the_counter_of_the_right_mapping() {
        let smaps =
            "1000-2000 rw-s\nShmemPmdMapped: 4 kB\n7f00-8f00 rw-s\nShmemPmdMapped: 2048 kB\n";
        assert_eq!(huge_mapped_kib(smaps, 0x7f00), Some(2048));
        assert_eq!(huge_mapped_kib(smaps, 0x9000), None);
    }
}
