//! Guest memory for confidential VMs.

pub mod addr;
mod backing;
pub mod error;
pub mod geometry;
mod os;
pub mod range;
mod sync;
