//! Guest memory for devices written against the `vm-memory` crate (feature `vm-memory`).
//!
//! An [`AddressSpace`] says which guest frames lie in which pages of which object. Device code calls
//! [`memory`](GuestAddressSpace::memory) on it and works on the [`MemoryGuard`] that it gets:
//! `virtio-queue`, boot loaders and vhost bindings take it as it is.
//!
//! **A guard pins exactly the pages of which it handed out slices.** Each page is pinned once per
//! guard, and stays so until the last clone of the guard is gone. Meanwhile a conversion of those
//! pages is refused with the name of the device; all other pages can be converted. So a guard should
//! live as long as a request, and no longer.
//!
//! What counts as a slice: `get_slice` and `get_slices`, `check_range` (what it found accessible
//! stays accessible while the guard lives), and, because `vm-memory` builds them on slices, every
//! access by guest address through the guard, however small. What does not: the accesses of a single
//! [`Region`] with buffers (`read`, `write` and what is built on them), which are transient.
//!
//! A range that touches private memory, or memory that the view cannot show, is refused as a whole, with the reason as
//! the source of the `GuestMemoryError::IOError`; [`refusal`] digs it out. Only a range that crosses from one slot to
//! another can be served in part, and then the number of bytes says how far it went.
//!
//! What devices write can be [logged](AddressSpace::with_dirty_log). A region has a
//! [`file_offset`](GuestMemoryRegion::file_offset) if its memory was [exported](AddressSpace::with_export):
//! a pool's files are not given to whoever asks.
//!
//! Slices point into the [`HostView`]: a pointer that outlives its guard, by code that is not safe,
//! faults on memory that turned private, and never reads it. On hugetlb, where a view shows huge
//! folios whole or not at all, a slice pins all of the folio.

// UNSAFETY: makes slices of memory that is mapped for as long as the region lives.
#![expect(unsafe_code, reason = "vm-memory hands out memory as pointer and length")]

mod dirty;
mod pins;

use std::fs::File;
use std::ops::Deref;
use std::ptr;
// Not from the facade, and not ours to choose: part of vm-memory's signatures.
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::bitmap::BS;
use vm_memory::{
    AtomicAccess, Bytes, FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryError,
    GuestMemoryRegion, GuestMemoryResult, GuestRegionCollection, GuestUsize, MemoryRegionAddress,
    ReadVolatile, VolatileSlice, WriteVolatile,
};

use dirty::{DirtyLog, MaybeBitmap};
use pins::PinSet;

use crate::addr::{ByteSize, Gfn, Offset};
use crate::error::{Errno, Error, ErrorKind, Op};
use crate::geometry::FolioSize;
use crate::gmem::{Export, GuestMemfd, HostView, OwnerTag, PinMode};
use crate::range::{GfnRange, PgoffRange};
use crate::sync::Mutex;

/// Memory that a device works on, and the log of what it writes, if there is one.
pub type GuestSlice<'a> = VolatileSlice<'a, BS<'a, MaybeBitmap>>;

/// A part of guest-physical memory: where it begins, and the pages of an object that it is.
#[derive(Clone, Debug)]
pub struct Slot {
    /// The guest frame of the first page.
    pub gfn: Gfn,
    /// The object, as the VMM has it mapped.
    pub view: Arc<HostView>,
    /// Which pages of the object.
    pub pages: PgoffRange,
}

/// A slot together with the name under which its pages are pinned.
#[derive(Clone, Debug)]
struct OwnedSlot {
    frames: GfnRange,
    slot: Slot,
    owner: OwnerTag,
    dirty: DirtyLog,
    /// Where another process has the slot, and what keeps it lent.
    lent: Option<(FileOffset, Arc<Export>)>,
}

/// The memory of a guest as one device sees it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct AddressSpace {
    slots: Arc<[Arc<OwnedSlot>]>,
}

impl AddressSpace {
    /// The given slots, in any order, for the device that is called `owner` in refusals.
    ///
    /// # Errors
    /// [`ErrorKind::EmptyRange`] without a slot, [`ErrorKind::Overflow`] where a slot's end cannot
    /// be expressed, [`ErrorKind::Exists`] where two slots overlap in guest memory,
    /// [`ErrorKind::OutOfRange`] where a slot reaches past the end of its object, and what
    /// [`GuestMemfd::register_owner`](crate::GuestMemfd::register_owner) says.
    pub fn new(owner: &str, slots: impl IntoIterator<Item = Slot>) -> Result<Self, Error> {
        let mut owned = slots
            .into_iter()
            .map(|slot| Ok(Arc::new(OwnedSlot::new(owner, slot)?)))
            .collect::<Result<Vec<_>, Error>>()?;
        owned.sort_by_key(|slot| slot.frames.start());
        if owned.is_empty() {
            return Err(Error::new(Op::BindSlot, ErrorKind::EmptyRange));
        }
        if owned.windows(2).any(|pair| pair[1].frames.start() < pair[0].frames.end()) {
            return Err(Error::new(Op::BindSlot, ErrorKind::Exists)
                .because("two slots overlap in guest memory"));
        }
        Ok(Self { slots: owned.into() })
    }

    /// The same memory for another device.
    ///
    /// # Errors
    /// What [`GuestMemfd::register_owner`](crate::GuestMemfd::register_owner) says.
    pub fn for_owner(&self, owner: &str) -> Result<Self, Error> {
        self.each(|slot| {
            let owner = slot.slot.view.memfd().register_owner(owner)?;
            Ok(OwnedSlot { owner, ..slot })
        })
    }

    /// The same memory, with a log of what is written through it, its clones and the address spaces made of
    /// it, page by page. Writes by pointers that others keep (vhost, io_uring) and those of the guest are not in it.
    ///
    /// # Errors
    /// [`ErrorKind::Overflow`] where a slot does not fit into the addresses of this machine.
    pub fn with_dirty_log(&self) -> Result<Self, Error> {
        self.each(|slot| Ok(OwnedSlot { dirty: DirtyLog::new(slot.frames)?, ..slot }))
    }

    /// What was written since the last time, in ascending order, and clears the log. A slice that is still
    /// in use marks its pages after it has written.
    pub fn take_dirty(&self) -> Vec<GfnRange> {
        self.slots.iter().flat_map(|slot| slot.dirty.take(slot.frames)).collect()
    }

    /// The same memory, where the slots whose pages are all in one run of a file of this export have a
    /// [`file_offset`](GuestMemoryRegion::file_offset). It stays lent for as long as the address space lives. An
    /// export of several [regions](Export::regions) wants a slot for each.
    ///
    /// # Errors
    /// [`ErrorKind::Os`] without a free file descriptor.
    pub fn with_export(&self, export: &Arc<Export>) -> Result<Self, Error> {
        self.each(|slot| match slot.file_in(export)? {
            Some(file) => Ok(OwnedSlot { lent: Some((file, Arc::clone(export))), ..slot }),
            None => Ok(slot),
        })
    }

    fn each(&self, change: impl Fn(OwnedSlot) -> Result<OwnedSlot, Error>) -> Result<Self, Error> {
        let slots = self.slots.iter().map(|slot| Ok(Arc::new(change(OwnedSlot::clone(slot))?)));
        Ok(Self { slots: slots.collect::<Result<_, Error>>()? })
    }
}

impl OwnedSlot {
    fn new(owner: &str, slot: Slot) -> Result<Self, Error> {
        let frames = GfnRange::new(slot.gfn, slot.pages.nr_pages())?;
        let object = slot.view.memfd();
        if !object.pages().covers(&slot.pages) {
            return Err(Error::new(Op::BindSlot, ErrorKind::OutOfRange).on(slot.pages));
        }
        let owner = object.register_owner(owner)?;
        Ok(Self { frames, slot, owner, dirty: DirtyLog::default(), lent: None })
    }

    fn object(&self) -> &GuestMemfd {
        self.slot.view.memfd()
    }

    /// Where in a file of the export the whole slot is.
    fn file_in(&self, export: &Export) -> Result<Option<FileOffset>, Error> {
        if !export.memfd().is(self.object()) {
            return Ok(None);
        }
        let Some(region) = export.regions().find(|it| it.pages.covers(&self.slot.pages)) else {
            return Ok(None);
        };
        let file = region.file.try_clone_to_owned().map_err(|error| {
            let errno = error.raw_os_error().map_or(Errno::EIO, Errno::new);
            Error::new(Op::Export, ErrorKind::Os).errno_is(errno).because("dup")
        })?;
        let skip = self.slot.pages.start().get() - region.pages.start().get();
        let start = region.file_start.get() + ByteSize::from_pages(skip).get();
        Ok(Some(FileOffset::new(File::from(file), start)))
    }
}

impl GuestAddressSpace for AddressSpace {
    type M = GuestRegionCollection<Region>;
    type T = MemoryGuard;

    fn memory(&self) -> MemoryGuard {
        let regions = self.slots.iter().map(|slot| Arc::new(Region::new(slot.clone()))).collect();
        // `new` has sorted the slots and refused what the collection would refuse.
        let regions = GuestRegionCollection::from_arc_regions(regions).unwrap_or_default();
        MemoryGuard { regions: Arc::new(regions) }
    }
}

/// Access to guest memory for the time of a request; see the [module](self) for what it pins.
/// Clones share the pins.
#[derive(Clone, Debug)]
pub struct MemoryGuard {
    regions: Arc<GuestRegionCollection<Region>>,
}

impl MemoryGuard {
    /// How much memory this guard and its clones hold pinned.
    pub fn pinned(&self) -> ByteSize {
        use vm_memory::GuestMemoryBackend;
        let nr_pages = self.regions.iter().map(|region| region.pins.lock().nr_pages()).sum();
        ByteSize::from_pages(nr_pages)
    }
}

impl Deref for MemoryGuard {
    type Target = GuestRegionCollection<Region>;

    fn deref(&self) -> &Self::Target {
        &self.regions
    }
}

/// A slot as one guard sees it.
#[derive(Debug)]
pub struct Region {
    slot: Arc<OwnedSlot>,
    pins: Mutex<PinSet>,
}

impl Region {
    fn new(slot: Arc<OwnedSlot>) -> Self {
        Self { slot, pins: Mutex::new(PinSet::default()) }
    }

    /// Where in the object the byte `at` of the region is, and how many bytes follow in the region.
    fn locate(&self, at: MemoryRegionAddress) -> GuestMemoryResult<(Offset, u64)> {
        let left = self.len().checked_sub(at.0).ok_or(GuestMemoryError::InvalidBackendAddress)?;
        let start = self.slot.slot.pages.start_offset();
        let offset = start.checked_add(ByteSize::from_bytes(at.0));
        Ok((offset.ok_or(GuestMemoryError::InvalidBackendAddress)?, left))
    }

    /// As many of `count` bytes from `at` on as the region has, but at least one.
    fn clamp(&self, at: MemoryRegionAddress, count: usize) -> GuestMemoryResult<(Offset, usize)> {
        match self.locate(at)? {
            (_, 0) => Err(GuestMemoryError::InvalidBackendAddress),
            (offset, left) => Ok((offset, usize::try_from(left).unwrap_or(usize::MAX).min(count))),
        }
    }

    fn host_pointer(&self, at: Offset, len: usize) -> GuestMemoryResult<*mut u8> {
        let pointer = self.slot.slot.view.pointer(at, ByteSize::from_bytes(len as u64));
        Ok(pointer.ok_or(GuestMemoryError::InvalidBackendAddress)?.as_ptr())
    }

    /// Pins what this guard has not pinned yet of the bytes, which are at least one.
    fn hold(&self, at: Offset, len: usize) -> Result<(), Error> {
        let object = self.slot.slot.view.memfd();
        // Where a view maps whole huge folios only, a neighbour that turns private takes the page
        // out of the view, too: all of them have to stay.
        let granule = object.pool().view_granule().bytes().get();
        let end = at.get().saturating_add(len as u64).next_multiple_of(granule);
        let start = at.get() - at.get() % granule;
        let pages = PgoffRange::from_bytes(Offset::new(start), ByteSize::from_bytes(end - start))?;
        self.pins.lock().add(pages, |gap| {
            let pin = object.pin(gap, self.slot.owner, PinMode::Counted)?.into_owned();
            // A hole that was punched in shared memory is not in the view, and one that somebody is
            // filling is not there yet. Once it is, the pin keeps it from being punched again.
            if !self.slot.slot.view.shows(gap) {
                object.allocate(gap)?;
                self.slot.slot.view.show_again(gap)?;
            }
            Ok(pin)
        })
    }
}

impl GuestMemoryRegion for Region {
    type B = MaybeBitmap;

    fn len(&self) -> GuestUsize {
        self.slot.frames.len_bytes().get()
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.slot.frames.start().ipa().get())
    }

    fn bitmap(&self) -> BS<'_, Self::B> {
        self.slot.dirty.slice_at(0)
    }

    /// Of exported memory only.
    fn file_offset(&self) -> Option<&FileOffset> {
        self.slot.lent.as_ref().map(|(file, _)| file)
    }

    fn is_hugetlbfs(&self) -> Option<bool> {
        Some(self.slot.object().pool().view_granule() != FolioSize::Base)
    }

    /// The byte's address in the host view. Nothing is pinned: the address stays valid while the
    /// view lives, and a touch faults while the page is private. Meant for memory tables that the
    /// kernel keeps (vhost), where a revoked page has to answer with `EFAULT`.
    fn get_host_address(&self, at: MemoryRegionAddress) -> GuestMemoryResult<*mut u8> {
        let (offset, len) = self.clamp(at, 1)?;
        self.host_pointer(offset, len)
    }

    fn get_slice(
        &self,
        at: MemoryRegionAddress,
        count: usize,
    ) -> GuestMemoryResult<GuestSlice<'_>> {
        let (offset, left) = self.locate(at)?;
        if count as u64 > left {
            return Err(GuestMemoryError::InvalidBackendAddress);
        }
        let bits = self.slot.dirty.slice_at(in_region(at));
        if count == 0 {
            // SAFETY: nothing can be reached through a slice without bytes.
            return Ok(unsafe { VolatileSlice::with_bitmap(ptr::dangling_mut(), 0, bits, None) });
        }
        self.hold(offset, count).map_err(into_memory_error)?;
        let start = self.host_pointer(offset, count)?;
        // SAFETY: 1. `locate` has checked that the bytes lie in the slot, `OwnedSlot::new` that the
        // slot lies in the object, all of which the view maps at consecutive addresses. 2. the slice
        // borrows the region, which holds the view, so they stay mapped. 3. the pins keep them
        // shared for as long. 4. nobody has a reference to them. That vm-memory's accesses and
        // ours race with different sizes, where the guest lets them race, is what its traits are like.
        Ok(unsafe { VolatileSlice::with_bitmap(start, count, bits, None) })
    }
}

/// By position in the slot. Reads and writes with a buffer are transient and pin nothing; the others
/// go through a slice of exactly the bytes in question.
impl Bytes<MemoryRegionAddress> for Region {
    type E = GuestMemoryError;

    fn write(&self, buf: &[u8], at: MemoryRegionAddress) -> GuestMemoryResult<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        let (offset, len) = self.clamp(at, buf.len())?;
        let written = self.slot.slot.view.write(offset, &buf[..len]);
        // Also after an error, which may have come half way.
        self.slot.dirty.mark(in_region(at), len);
        written.map_err(into_memory_error)?;
        Ok(len)
    }

    fn read(&self, buf: &mut [u8], at: MemoryRegionAddress) -> GuestMemoryResult<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        let (offset, len) = self.clamp(at, buf.len())?;
        self.slot.slot.view.read(offset, &mut buf[..len]).map_err(into_memory_error)?;
        Ok(len)
    }

    fn write_slice(&self, buf: &[u8], at: MemoryRegionAddress) -> GuestMemoryResult<()> {
        whole(self.write(buf, at)?, buf.len())
    }

    fn read_slice(&self, buf: &mut [u8], at: MemoryRegionAddress) -> GuestMemoryResult<()> {
        let expected = buf.len();
        whole(self.read(buf, at)?, expected)
    }

    fn read_volatile_from<F: ReadVolatile>(
        &self,
        at: MemoryRegionAddress,
        source: &mut F,
        count: usize,
    ) -> GuestMemoryResult<usize> {
        let (_, len) = self.clamp(at, count)?;
        Ok(self.get_slice(at, len)?.read_volatile_from(0, source, len)?)
    }

    fn read_exact_volatile_from<F: ReadVolatile>(
        &self,
        at: MemoryRegionAddress,
        source: &mut F,
        count: usize,
    ) -> GuestMemoryResult<()> {
        Ok(self.get_slice(at, count)?.read_exact_volatile_from(0, source, count)?)
    }

    fn write_volatile_to<F: WriteVolatile>(
        &self,
        at: MemoryRegionAddress,
        target: &mut F,
        count: usize,
    ) -> GuestMemoryResult<usize> {
        let (_, len) = self.clamp(at, count)?;
        Ok(self.get_slice(at, len)?.write_volatile_to(0, target, len)?)
    }

    fn write_all_volatile_to<F: WriteVolatile>(
        &self,
        at: MemoryRegionAddress,
        target: &mut F,
        count: usize,
    ) -> GuestMemoryResult<()> {
        Ok(self.get_slice(at, count)?.write_all_volatile_to(0, target, count)?)
    }

    fn store<T: AtomicAccess>(
        &self,
        value: T,
        at: MemoryRegionAddress,
        order: Ordering,
    ) -> GuestMemoryResult<()> {
        Ok(self.get_slice(at, size_of::<T>())?.store(value, 0, order)?)
    }

    fn load<T: AtomicAccess>(
        &self,
        at: MemoryRegionAddress,
        order: Ordering,
    ) -> GuestMemoryResult<T> {
        Ok(self.get_slice(at, size_of::<T>())?.load(0, order)?)
    }
}

/// Why guest memory could not be accessed, where it was this library that said no.
pub fn refusal(error: &GuestMemoryError) -> Option<&Error> {
    match error {
        GuestMemoryError::IOError(io) => io.get_ref()?.downcast_ref(),
        _ => None,
    }
}

fn into_memory_error(error: Error) -> GuestMemoryError {
    match error.kind() {
        ErrorKind::OutOfRange | ErrorKind::Overflow => GuestMemoryError::InvalidBackendAddress,
        _ => GuestMemoryError::IOError(error.into()),
    }
}

/// Where in a region that an address of this process has room for.
fn in_region(at: MemoryRegionAddress) -> usize {
    usize::try_from(at.0).unwrap_or(usize::MAX)
}

fn whole(completed: usize, expected: usize) -> GuestMemoryResult<()> {
    if completed == expected {
        Ok(())
    } else {
        Err(GuestMemoryError::PartialBuffer { expected, completed })
    }
}
