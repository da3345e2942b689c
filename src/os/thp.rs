//! Transparent huge pages of shared memory: whether the host allows them.

use std::fs;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_bracketed_word() {
        assert_eq!(selected("always within_size advise [never] deny force\n"), Some("never"));
        assert_eq!(selected("no brackets"), None);
    }
}
