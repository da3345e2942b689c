//! Guest memory for confidential VMs.

pub mod addr;
pub mod error;
pub mod geometry;
pub mod range;
