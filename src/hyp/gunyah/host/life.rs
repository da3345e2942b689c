//! A VM's life: the resource manager makes it, starts it, and takes it apart.

use std::sync::Arc;

use super::Guest;
use super::calls::{Resources, message};
use super::given::Book;
use super::provide::Contents;
use crate::addr::Pfn;
use crate::error::Errno;
use crate::hyp::gunyah::rm::message::{LEND, RECLAIM, RELEASE};
use crate::hyp::gunyah::rm::vm::{Auth, Image, VmState};
use crate::hyp::gunyah::rm::{Vmid, release};
use crate::hyp::gunyah::{Gunyah, World};
use crate::range::PfnRange;

/// What a VM finds its image at. Its place is free again when it runs.
const IMAGE_AT: u64 = 0;
/// How much a VM's end takes back at once, in pieces of what was given.
const BATCH: usize = 64;

/// Frames lent to one VM, with all rights.
pub(super) fn lend(to: Vmid, frames: PfnRange) -> Vec<u8> {
    let [low, high] = to.0.to_le_bytes();
    // Memory, no wishes, no label; one VM; one piece; no attributes.
    let mut body = vec![0; 8];
    body.extend([1, 0, 0, 0, low, high, 7, 0]);
    body.extend([1, 0, 0, 0]);
    body.extend(frames.start().pa().get().to_le_bytes());
    body.extend(frames.len_bytes().get().to_le_bytes());
    body.extend([0; 4]);
    body
}

pub(super) fn with_flags(handle: u32, flags: u8) -> Vec<u8> {
    handle.to_le_bytes().into_iter().chain([flags, 0, 0, 0]).collect()
}

impl World {
    fn state(&self, vmid: Vmid) -> Option<VmState> {
        Some(self.rm.vms.get(&vmid)?.state)
    }

    /// Lends a VM the page that it begins with.
    fn lend_image(&mut self, vmid: Vmid, page: Pfn) -> Result<u32, Errno> {
        let page = PfnRange::single(page).map_err(|error| error.errno())?;
        let handle = message(self, Vmid::HLOS, LEND, &lend(vmid, page))?;
        let handle = handle.try_into().map_err(|_| Errno::EIO)?;
        Ok(u32::from_le_bytes(handle))
    }

    fn start(&mut self, vmid: Vmid, handle: u32) -> Result<Resources, Errno> {
        let Self { hyp, rm, .. } = self;
        let host = Vmid::HLOS;
        let image = Image { handle, ipa: IMAGE_AT, unsanitized: false };
        rm.config_image(hyp, host, vmid, Auth::Android as u32, image)?;
        let paging = rm.set_demand_paging(hyp, host, vmid)?;
        rm.init_vm(hyp, host, vmid)?;
        rm.start_vm(host, vmid)?;
        let home = |vmid| rm.vms.get(&vmid).and_then(|vm| vm.home).ok_or(Errno::ENODEV);
        let resources = Resources::new(home(host)?, home(vmid)?, paging)?;
        // It has seen its image, and needs it no more.
        message(self, vmid, RELEASE, &with_flags(handle, 0))?;
        Ok(resources)
    }

    /// Has a VM's first page back. By then it has let go of it.
    fn reclaim_image(&mut self, handle: u32, page: Pfn) -> Result<(), Errno> {
        let body = with_flags(handle, release::SANITIZE);
        message(self, Vmid::HLOS, RECLAIM, &body)?;
        self.kernel.free.push(page);
        Ok(())
    }
}

impl Guest {
    /// A VM that runs, and has no memory.
    ///
    /// # Errors
    /// `ENODEV` if there are too many; `ENOMEM`, or `EINVAL` if tables run out while it accepts its first page.
    pub(crate) fn create(gunyah: &Arc<Gunyah>) -> Result<Self, Errno> {
        let (vmid, page) = gunyah.with(|world| {
            let page = world.kernel.free.pop().ok_or(Errno::ENODEV)?;
            let vmid = world.rm.allocate(Vmid::HLOS, Vmid(0));
            vmid.map(|vmid| (vmid, page)).map_err(|error| {
                world.kernel.free.push(page);
                Errno::from(error)
            })
        })?;
        let lent = gunyah.with(|world| world.lend_image(vmid, page));
        let handle = match lent {
            Ok(handle) => handle,
            Err(errno) => {
                gunyah.with(|world| world.kernel.free.push(page));
                forget(gunyah, vmid)?;
                return Err(errno);
            }
        };
        let started = gunyah.with(|world| world.start(vmid, handle));
        if let Err(errno) = started {
            // Its end gives the image up, if it had that already.
            end(gunyah, vmid)?;
            gunyah.with(|world| world.reclaim_image(handle, page))?;
            return Err(errno);
        }
        let guest = Self {
            gunyah: Arc::clone(gunyah),
            vmid: Some(vmid),
            resources: started?,
            book: Book::default(),
        };
        gunyah.with(|world| world.reclaim_image(handle, page))?;
        Ok(guest)
    }

    /// Its number. `None` when it is gone.
    pub(crate) fn vmid(&self) -> Option<Vmid> {
        self.vmid
    }

    fn alive(&self) -> Result<Vmid, Errno> {
        self.vmid.ok_or(Errno::EINVAL)
    }

    /// How far it has come. `None` when it is gone.
    pub(crate) fn state(&self) -> Option<VmState> {
        self.gunyah.world.read().state(self.vmid?)
    }

    /// Halts it, or lets it go on.
    ///
    /// # Errors
    /// `EINVAL` unless it runs, or is halted.
    pub(crate) fn pause(&self, pause: bool) -> Result<(), Errno> {
        let vmid = self.alive()?;
        Ok(self.gunyah.with(|world| world.rm.pause_vm(Vmid::HLOS, vmid, pause))?)
    }

    /// It runs no more.
    ///
    /// # Errors
    /// `EINVAL` if it does not run.
    pub(crate) fn stop(&self) -> Result<(), Errno> {
        let vmid = self.alive()?;
        Ok(self.gunyah.with(|world| world.rm.stop_vm(Vmid::HLOS, vmid))?)
    }

    /// Has it taken apart: it stops, all memory comes back, what was lent cleared, and then the rest goes.
    ///
    /// # Errors
    /// `EINVAL` if it is taken apart, or gone; `ENOMEM`, and it may be tried again.
    pub(crate) fn reset(&mut self) -> Result<(), Errno> {
        match self.state() {
            None | Some(VmState::Reset) => return Err(Errno::EINVAL),
            Some(VmState::Running | VmState::Paused) => self.stop()?,
            Some(_) => {}
        }
        loop {
            let batch: Vec<_> = self.book.iter().take(BATCH).map(|given| given.run).collect();
            if batch.is_empty() {
                break;
            }
            self.reclaim(&batch, Contents::Clear)?;
        }
        reset(&self.gunyah, self.alive()?)
    }

    /// Ends it, if it is not taken apart yet, and forgets it.
    ///
    /// # Errors
    /// `EINVAL` if it is gone already; `ENOMEM`, and it may be tried again.
    pub(crate) fn teardown(&mut self) -> Result<(), Errno> {
        if self.state() != Some(VmState::Reset) {
            self.reset()?;
        }
        forget(&self.gunyah, self.alive()?)?;
        self.vmid = None;
        Ok(())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Refused if it was torn down by hand.
        let _ = self.teardown();
    }
}

/// Ends a VM that could not be started.
fn end(gunyah: &Gunyah, vmid: Vmid) -> Result<(), Errno> {
    match gunyah.with(|world| world.state(vmid)) {
        Some(VmState::Load) => {}
        Some(VmState::Running) => {
            gunyah.with(|world| world.rm.stop_vm(Vmid::HLOS, vmid))?;
            reset(gunyah, vmid)?;
        }
        _ => reset(gunyah, vmid)?,
    }
    forget(gunyah, vmid)
}

/// Takes a VM apart, or goes on with that.
fn reset(gunyah: &Gunyah, vmid: Vmid) -> Result<(), Errno> {
    if gunyah.with(|world| world.state(vmid)) != Some(VmState::Resetting) {
        gunyah.with(|world| world.rm.reset_vm(Vmid::HLOS, vmid))?;
    }
    while gunyah.with(|World { hyp, rm, .. }| rm.reset_step(hyp, vmid))? {}
    Ok(())
}

fn forget(gunyah: &Gunyah, vmid: Vmid) -> Result<(), Errno> {
    Ok(gunyah.with(|world| world.rm.deallocate(Vmid::HLOS, vmid))?)
}
