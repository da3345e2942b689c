//! A hypervisor in front of a pool, whichever it is.

use std::sync::Arc;

use super::incidents::{IncidentStat, PreventedCounts};
use super::model::Model;
use super::monitor::{Given, Monitor};
use super::raw_host::RawHost;
use super::vm::{Vm, VmKind};
use super::{gunyah, pkvm};
use crate::addr::{ByteSize, Pfn};
use crate::backing::Arena;
use crate::error::{Errno, Error, ErrorKind, Op};
use crate::folio::{Claim, FolioPool};
use crate::state::Visibility;
use crate::sync::Mutex;

/// The hypervisor of a simulated machine, and the kernel of its host. Clones are handles to the same one.
///
/// The machine's memory is one [`FolioPool`]. All guests whose memory comes from a pool run under one hypervisor: another
/// one would not know which frames are given away, and is refused.
///
/// # Protected guests
/// A guest by [`create_vm`](Self::create_vm) has its memory to itself. It is given a page when it touches it, or by a
/// conversion to private, and keeps it as long as its hypervisor's rules say: [`Model`].
///
/// # Guests that are not
/// A guest by [`create_non_protected_vm`](Self::create_non_protected_vm) is shown the host's pages, by 2 MiB where a huge
/// folio allows that. They stay the host's: they can be punched, moved and unbound, and the guest loses them and faults
/// again. A page that is private in the object is nobody's to such a guest: its access exits with
/// [`MemoryFault`](super::Exit::MemoryFault), and no page that it has bound turns private. An object whose pages are
/// private at first may be bound; they fault until somebody converts them to shared.
#[derive(Clone, Debug)]
pub struct Hypervisor(pub(super) Arc<Host>);

/// Lock order: an object's layout, the state of one VM, then the monitor's own. None of them is held while an object is
/// called.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) model: Model,
    pub(super) arena: Arc<Arena>,
    pub(super) monitor: Arc<dyn Monitor>,
    pub(super) prevented: Arc<PreventedCounts>,
    nr_vms: Mutex<usize>,
    _claim: Claim,
}

/// What a hypervisor has given away at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct HostStat {
    /// Memory that guests have to themselves.
    pub donated: ByteSize,
    /// Memory of guests that the host may see.
    pub borrowed: ByteSize,
    /// Memory of the host that guests may see.
    pub shown: ByteSize,
    /// Virtual machines that are not torn down.
    pub nr_vms: usize,
}

impl Hypervisor {
    /// The default one, of a machine whose memory is this pool.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] while the pool has a hypervisor already; [`ErrorKind::Exhausted`].
    pub fn new(pool: &FolioPool) -> Result<Self, Error> {
        Self::with(pool, Model::default())
    }

    /// Another one.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with(pool: &FolioPool, model: impl Into<Model>) -> Result<Self, Error> {
        let model = model.into();
        Self::of(pool, model, |arena| match model {
            Model::Pkvm(profile) => Ok(pkvm::Machine::boot(profile, arena)?),
            Model::Gunyah(policy) => Ok(gunyah::FrontMachine::boot(policy, arena)?),
        })
    }

    /// One that is booted by the way.
    pub(super) fn of(
        pool: &FolioPool,
        model: Model,
        boot: impl FnOnce(&Arc<Arena>) -> Result<Arc<dyn Monitor>, Errno>,
    ) -> Result<Self, Error> {
        let claim = pool.claim().ok_or_else(|| {
            Error::new(Op::Hypervisor, ErrorKind::Exists).because("the pool has one already")
        })?;
        let arena = Arc::clone(pool.arena());
        let monitor = boot(&arena).map_err(refused)?;
        Ok(Self(Arc::new(Host {
            model,
            arena,
            monitor,
            prevented: Arc::default(),
            nr_vms: Mutex::new(0),
            _claim: claim,
        })))
    }

    /// Which one it is.
    pub fn model(&self) -> Model {
        self.0.model
    }

    /// A protected guest, with no memory and no vCPU, and 40 bits of address.
    ///
    /// # Errors
    /// [`ErrorKind::Exhausted`] beyond as many guests as the hypervisor can have, or without memory for it.
    pub fn create_vm(&self) -> Result<Vm, Error> {
        Vm::create(&self.0, VmKind::Protected)
    }

    /// A guest that is not protected: its memory stays the host's, which shows it to the guest.
    ///
    /// # Errors
    /// As [`create_vm`](Self::create_vm).
    pub fn create_non_protected_vm(&self) -> Result<Vm, Error> {
        Vm::create(&self.0, VmKind::NonProtected)
    }

    /// Tells of the frames that guests see: private to one, or seen by the host as well. What an audit compares with the
    /// objects.
    pub(crate) fn each_frame_of_guests(&self, mut see: impl FnMut(Pfn, Visibility)) {
        self.0.monitor.each_frame_of_guests(&mut see);
    }

    /// Everything that is wrong with the hypervisor, of whose frames the host may reach some at any moment; empty if all is
    /// well. Everybody waits meanwhile.
    pub(crate) fn check_invariants(&self, borrowed: Vec<Pfn>) -> Vec<String> {
        self.0.monitor.check(borrowed)
    }

    /// What is given away. Counted a piece at a time: what changes hands meanwhile may count as before or after.
    pub fn stat(&self) -> HostStat {
        let nr_vms = *self.0.nr_vms.lock();
        let Given { donated, borrowed, shown } = self.0.monitor.given();
        HostStat { donated, borrowed, shown, nr_vms }
    }

    /// How often a real host would have crashed or lost something, and how often it was kept from that.
    pub fn incidents(&self) -> IncidentStat {
        self.0.monitor.incidents().with_prevented(&self.0.prevented)
    }

    /// The host as it is without this library: it touches the bytes of an object by itself.
    pub fn raw_host(&self) -> RawHost {
        RawHost(self.clone())
    }
}

impl Host {
    pub(super) fn count_one_more(&self) {
        let mut nr = self.nr_vms.lock();
        *nr = nr.saturating_add(1);
    }

    pub(super) fn count_one_less(&self) {
        let mut nr = self.nr_vms.lock();
        *nr = nr.saturating_sub(1);
    }
}

/// What the hypervisor refuses by itself.
pub(super) fn refused(errno: Errno) -> Error {
    let kind = match errno {
        Errno::ENOMEM => ErrorKind::Exhausted,
        _ => ErrorKind::HypervisorRefused,
    };
    Error::new(Op::Hypervisor, kind).errno_is(errno)
}
