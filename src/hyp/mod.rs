//! Simulated hypervisors: they run anywhere, and say no where the real ones do.
//!
//! | file | holds |
//! |---|---|
//! | `hypervisor` | a hypervisor in front of a pool |
//! | `model` | which one it is, by name |
//! | `vm`, `memslot` | a guest's life, and which of its frames are which pages of an object |
//! | `vcpu` | a virtual CPU: the guest's loads, stores and atomics, and its hypercalls |
//! | `exit` | why a vCPU stops, and what its VMM can do about it |
//! | `hypercall` | what a guest's registers ask for |
//! | `choices` | for tests and fuzzers: bytes as what somebody hostile does |
//! | `raw_host` | a host that asks nobody |
//! | `incidents` | what went wrong, and what was kept from it |
//! | `order` | which locks come before which, watched over |
//! | `monitor` | what a hypervisor does behind all that |
//! | [`pkvm`] | one after pKVM: who owns which page; `el2` is the thing itself, `kernel` what any host kernel does to have VMs there |
//! | [`gunyah`] | one after Gunyah: memory is lent, and comes back |
//! | [`iommu`] | devices, and the domain that maps memory for them |
//!
//! ```
//! use gmem::addr::{ByteSize, Gfn, Ipa, Offset};
//! use gmem::hyp::{Exit, Hypercall, HvcResult, Hypervisor};
//! use gmem::{ArenaBacking, FolioPool, GuestMemfd};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let pool = FolioPool::new(ArenaBacking::Heap, ByteSize::from_mib(1))?;
//! let memfd = GuestMemfd::builder(ByteSize::from_kib(64)).create(&pool)?;
//! let vm = Hypervisor::new(&pool)?.create_vm()?;
//! vm.bind(Gfn::new(0), &memfd, memfd.pages())?;
//!
//! let mut vcpu = vm.create_vcpu()?;
//! vcpu.store(Ipa::new(0x3000), b"hello")?;
//! let mut seen = [0; 5];
//! assert!(memfd.read(Offset::new(0x3000), &mut seen).is_err()); // private: refused
//!
//! match vcpu.hvc(Hypercall::MemShare(Ipa::new(0x3000))) {
//!     Err(Exit::Conversion(request)) => request.convert()?, // the VMM agrees
//!     other => panic!("{other:?}"),
//! };
//! assert_eq!(vcpu.answer()?, HvcResult::SUCCESS);
//! memfd.read(Offset::new(0x3000), &mut seen)?;
//! assert_eq!(&seen, b"hello");
//! # Ok(())
//! # }
//! ```
//!
//! A guest here is whatever code the VMM runs against a [`Vcpu`]. Nothing that it passes in is
//! trusted: any address and any register value gets an answer or an exit.

#[cfg(any(test, feature = "oracle"))]
pub(crate) mod choices;
pub(crate) mod el2;
mod exit;
#[cfg_attr(not(test), expect(dead_code, reason = "VMs can ask for more than a VMM's guests do"))]
pub mod gunyah;
mod hypercall;
mod hypervisor;
mod incidents;
pub mod iommu;
mod kernel;
#[cfg(feature = "oracle")]
pub mod linux;
mod memslot;
mod model;
mod monitor;
mod order;
pub mod pkvm;
mod raw_host;
mod vcpu;
mod vm;

/// Hostile hosts and guests for the simulated hypervisors, which are their own judges: for fuzzers.
#[cfg(feature = "oracle")]
pub mod oracle {
    pub use super::gunyah::oracle::*;
    pub use super::pkvm::oracle::*;
}

#[cfg(feature = "oracle")]
#[doc(hidden)]
pub use gunyah::host::extents_only;

pub use exit::{ConversionRequest, Exit, MmioAccess};
pub use gunyah::SharedMemory;
pub use hypercall::{HvcResult, Hypercall, Registers};
pub use hypervisor::{HostStat, Hypervisor};
pub use incidents::IncidentStat;
pub use memslot::MemslotId;
pub use model::Model;
pub use pkvm::Profile;
pub use raw_host::{RawHost, RawOutcome, RawPath};
pub use vcpu::Vcpu;
pub use vm::{Vm, VmKind, VmStat};
