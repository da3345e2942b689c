//! The host's pools of hugetlb pages.

use std::fs;
use std::path::Path;

use crate::addr::ByteSize;
use crate::error::{Error, ErrorKind, Op};
use crate::geometry::FolioSize;

/// How much is free and promised to nobody. Pages that the kernel might make on demand
/// (`nr_overcommit_hugepages`) do not count.
///
/// # Errors
/// [`ErrorKind::MissingCapability`] if the host has no pages of this size.
pub(crate) fn unclaimed(size: FolioSize) -> Result<ByteSize, Error> {
    unclaimed_in(Path::new("/sys/kernel/mm/hugepages"), size)
}

fn unclaimed_in(root: &Path, size: FolioSize) -> Result<ByteSize, Error> {
    let kib = size.bytes().get() >> 10;
    let pool = root.join(format!("hugepages-{kib}kB"));
    let number = |name: &str| -> Option<u64> {
        fs::read_to_string(pool.join(name)).ok()?.trim().parse().ok()
    };
    match (number("free_hugepages"), number("resv_hugepages")) {
        (Some(free), Some(reserved)) => {
            let bytes = free.saturating_sub(reserved).saturating_mul(size.bytes().get());
            Ok(ByteSize::from_bytes(bytes))
        }
        _ => Err(Error::new(Op::CreatePool, ErrorKind::MissingCapability)
            .because(format!("no hugetlb pages: {} has no counters", pool.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "writes files")]
    fn what_is_promised_does_not_count() {
        let root = std::env::temp_dir().join(format!("gmem-hugetlb-{}", std::process::id()));
        let pool = root.join("hugepages-2048kB");
        fs::create_dir_all(&pool).unwrap();
        fs::write(pool.join("free_hugepages"), "5\n").unwrap();
        let lacking = unclaimed_in(&root, FolioSize::Huge2M).unwrap_err();
        assert_eq!(lacking.kind(), ErrorKind::MissingCapability);
        fs::write(pool.join("resv_hugepages"), "2\n").unwrap();
        assert_eq!(unclaimed_in(&root, FolioSize::Huge2M), Ok(ByteSize::from_mib(6)));
        let error = unclaimed_in(&root, FolioSize::Huge1G).unwrap_err();
        assert!(error.to_string().contains("hugepages-1048576kB"), "{error}");
        fs::remove_dir_all(root).unwrap();
    }
}
