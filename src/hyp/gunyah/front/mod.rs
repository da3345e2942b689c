//! Gunyah as a VMM sees it: VMs whose memory the host lends and shares when they touch it.
//!
//! | file | one idea |
//! |---|---|
//! | `vm` | a guest: its life, and what it has |
//! | `hooks` | what objects ask: lent, shared, turned, taken back |
//! | `vcpu` | accesses, and the calls that the host's kernel answers |

mod hooks;
mod vcpu;
mod vm;

use std::collections::BTreeSet;
use std::sync::{Arc, Weak};

use self::vm::VmCore;
use super::Gunyah;
use super::memdb::Owner;
use super::rm::Vmid;
use super::touch::{Bytes as OneWay, KernelOutcome};
use crate::addr::{ByteSize, Gfn, Pa, Pfn};
use crate::backing::Arena;
use crate::error::Errno;
use crate::hyp::el2::Bytes;
use crate::hyp::incidents::IncidentStat;
use crate::hyp::monitor::{Given, Guest, Monitor};
use crate::hyp::raw_host::{RawOutcome, RawPath};
use crate::hyp::vm::{Book, VmKind};
use crate::range::PfnRange;
use crate::state::Visibility;
use crate::sync::Mutex;

pub(in crate::hyp) use self::vcpu::Vcpu;

/// How memory that guest and host share comes about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum SharedMemory {
    /// A guest asks, page by page, and the VMM converts.
    #[default]
    Dynamic,
    /// What the VMM has bound as shared and nothing else, for good; crosvm has it so. To convert memory otherwise is
    /// refused, with `EOPNOTSUPP`. A guest that asks for what is there already is told that it was done.
    Static,
}

/// A machine, and the kernel of its host.
///
/// Lock order: the state of a VM, the VM as the kernel has it, then the hypervisor's own.
#[derive(Debug)]
pub(in crate::hyp) struct Machine {
    policy: SharedMemory,
    arena: Arc<Arena>,
    gunyah: Arc<Gunyah>,
    guests: Mutex<Vec<Weak<VmCore>>>,
    /// How often the kernel used a pointer of its own, and died.
    nr_fatal: Mutex<u64>,
}

impl Machine {
    /// # Errors
    /// `ENOMEM`; `EINVAL` for more memory than such a machine can have.
    pub(in crate::hyp) fn boot(
        policy: SharedMemory,
        arena: &Arc<Arena>,
    ) -> Result<Arc<Self>, Errno> {
        Ok(Arc::new(Self {
            policy,
            arena: Arc::clone(arena),
            gunyah: Arc::new(Gunyah::on_arena(arena)?),
            guests: Mutex::new(Vec::new()),
            nr_fatal: Mutex::new(0),
        }))
    }

    fn guests(&self) -> Vec<Arc<VmCore>> {
        self.guests.lock().iter().filter_map(Weak::upgrade).collect()
    }

    /// The frames of one owner.
    fn frames_of(&self, owner: Owner) -> Vec<PfnRange> {
        let all = PfnRange::new(Pfn::new(0), self.arena.nr_pages());
        let world = self.gunyah.world.read();
        all.map(|all| world.hyp.memdb.walk(all, owner)).unwrap_or_default()
    }

    fn nr_pages_of(&self, owner: Owner) -> u64 {
        self.frames_of(owner).iter().map(PfnRange::nr_pages).sum()
    }

    /// What no guest has is the host's.
    fn check_host(&self, nr_with_guests: u64) -> Option<String> {
        let host = self.gunyah.world.read().rm.vms.get(&Vmid::HLOS).and_then(|vm| vm.home)?;
        let nr_with_host = self.nr_pages_of(Owner::Extent(host.memory));
        let nr_pages = self.arena.nr_pages();
        (nr_with_host + nr_with_guests != nr_pages).then(|| {
            format!(
                "of {nr_pages} pages the host has {nr_with_host} and its guests {nr_with_guests}: \
                 some were left with a guest that is gone"
            )
        })
    }

    fn touch_as_host(&self, by: RawPath, at: Pa, bytes: OneWay<'_>) -> RawOutcome {
        // The host sees all memory where it is.
        let at = Gfn::new(at.pfn().get()).ipa().checked_add(at.in_page());
        let Some(at) = at else { return RawOutcome::Sigbus };
        match by {
            RawPath::User => match self.gunyah.user(at, bytes) {
                Ok(()) => RawOutcome::Done,
                Err(_) => RawOutcome::Sigbus,
            },
            RawPath::Uaccess => match self.gunyah.uaccess(at, bytes) {
                Ok(()) => RawOutcome::Done,
                Err(_) => RawOutcome::Efault,
            },
            RawPath::KernelAlias => match self.gunyah.kernel_alias(at, bytes) {
                KernelOutcome::Done => RawOutcome::Done,
                KernelOutcome::Fatal => {
                    let mut nr = self.nr_fatal.lock();
                    *nr = nr.saturating_add(1);
                    RawOutcome::Oops
                }
            },
            // The host's devices are behind what the host sees.
            RawPath::Dma => match self.gunyah.vcpu(Vmid::HLOS, at, bytes) {
                Ok(()) => RawOutcome::Done,
                Err(_) => RawOutcome::DmaFault,
            },
        }
    }
}

impl Monitor for Machine {
    fn create_guest(self: Arc<Self>, book: &Arc<Book>) -> Result<Arc<dyn Guest>, Errno> {
        let core = VmCore::new(&self, book)?;
        let mut guests = self.guests.lock();
        guests.retain(|guest| guest.strong_count() > 0);
        guests.push(Arc::downgrade(&core));
        Ok(core)
    }

    fn given(&self) -> Given {
        let (mut donated, mut borrowed, mut shown) = (0, 0, 0);
        for guest in self.guests() {
            let (lent, shared) = guest.nr_pages();
            donated += lent;
            match guest.kind() {
                VmKind::Protected => borrowed += shared,
                VmKind::NonProtected => shown += shared,
            }
        }
        let [donated, borrowed, shown] = [donated, borrowed, shown].map(ByteSize::from_pages);
        Given { donated, borrowed, shown }
    }

    fn each_frame_of_guests(&self, see: &mut dyn FnMut(Pfn, Visibility)) {
        for guest in self.guests() {
            for (extent, side) in guest.extents() {
                let runs = self.frames_of(Owner::Extent(extent));
                runs.iter().flat_map(PfnRange::iter).for_each(|pfn| see(pfn, side));
            }
        }
    }

    fn check(&self, borrowed: Vec<Pfn>) -> Vec<String> {
        let mut wrong = self.gunyah.check();
        let guests = self.guests();
        wrong.extend(guests.iter().flat_map(|guest| guest.check()));
        let nr_with_guests = guests.iter().map(|guest| guest.nr_pages()).map(|(a, b)| a + b).sum();
        wrong.extend(self.check_host(nr_with_guests));
        let world = self.gunyah.world.read();
        let seen = world.space_of_running(Vmid::HLOS);
        for pfn in borrowed.into_iter().collect::<BTreeSet<_>>() {
            let to = seen.and_then(|space| space.tree.translate(Gfn::new(pfn.get())));
            if to.is_none_or(|(to, _)| to != pfn) {
                wrong.push(format!("40: the host may reach {pfn}, and cannot see it"));
            }
        }
        wrong
    }

    fn incidents(&self) -> IncidentStat {
        IncidentStat { nr_oopses: *self.nr_fatal.lock(), ..IncidentStat::default() }
    }

    fn touch(&self, by: RawPath, at: Pa, bytes: Bytes<'_>) -> RawOutcome {
        match bytes {
            Bytes::Load(buf) => self.touch_as_host(by, at, OneWay::Load(buf)),
            Bytes::Store(data) => self.touch_as_host(by, at, OneWay::Store(data)),
        }
    }
}
