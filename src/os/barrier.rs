//! The heavy half of an asymmetric barrier: `membarrier(2)`, private and expedited.
//!
//! Rule and source: membarrier(2) promises that between its call and its return every running
//! thread of the process has gone through a full memory barrier, so a reader needs none of its own.

use std::sync::OnceLock;

use rustix::thread::{MembarrierCommand, membarrier};

/// Whether this process may use the expedited barrier; asks the kernel once.
pub(crate) fn is_available() -> bool {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    *REGISTERED.get_or_init(|| membarrier(MembarrierCommand::RegisterPrivateExpedited).is_ok())
}

/// Makes every running thread of the process pass a full barrier. `false` if the kernel refused.
pub(crate) fn heavy() -> bool {
    membarrier(MembarrierCommand::PrivateExpedited).is_ok()
}

#[cfg(test)]
mod tests {
    #[test]
    #[cfg_attr(miri, ignore = "no membarrier under Miri")]
    fn available_means_it_works() {
        if super::is_available() {
            assert!(super::heavy());
        }
    }
}
