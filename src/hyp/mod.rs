//! Simulated hypervisors: they run anywhere, and say no where the real ones do.
//!
//! | file | holds |
//! |---|---|
//! | `vcpu` | a virtual CPU: the guest's loads, stores and atomics, and its hypercalls |
//! | `exit` | why a vCPU stops, and what its VMM can do about it |
//! | `hypercall` | what a guest's registers ask for |
//! | [`pkvm`] | the hypervisor behind them, after pKVM: who owns which page |
//!
//! A guest here is whatever code the VMM runs against a [`Vcpu`]. Nothing that it passes in is
//! trusted: any address and any register value gets an answer or an exit.

mod exit;
mod hypercall;
pub mod pkvm;
mod vcpu;

pub use exit::{ConversionRequest, Exit, MmioAccess};
pub use hypercall::{HvcResult, Hypercall};
pub use vcpu::Vcpu;
