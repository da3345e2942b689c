//! The object mapped into the VMM: shared pages are there, private ones fault.
//!
//! A view is a range of addresses that begins as a mapping of the object's empty file, where every
//! touch is a `SIGBUS`. Folios of the arena are mapped over it and registered with userfaultfd, so
//! that a page without a page-table entry is a `SIGBUS` too. To share a page is to give it an entry,
//! to make it private is to take that away: no mapping is split, no byte moves.
//!
//! What this covers: loads, stores and system calls of this process through this view. What it does
//! not: a child after fork (it gets no mapping at all), other mappings of the arena, and pins that
//! the kernel took through the view earlier (io_uring, O_DIRECT, VFIO).

use std::fmt;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bitvec::vec::BitVec;

use super::object::{GuestMemfd, Inner};
use super::punch::between;
use crate::addr::{Access, ByteSize, Hva, Offset, Pfn};
use crate::backing::Arena;
use crate::error::{Error, ErrorKind, Op};
use crate::folio::try_bits;
use crate::geometry::{FolioSize, index};
use crate::os::mapping::Mapping;
use crate::os::sigbus::{FaultCause, NotTouched, RawFault, SigbusHandler};
use crate::os::uffd::Userfault;
use crate::range::{PfnRange, PgoffRange};
use crate::state::Visibility;

/// One mapping of an object.
pub(super) struct ViewMap {
    // Before `uffd`, since fields are dropped in this order: without it every page that the mapping
    // still covers could be touched.
    map: Mapping,
    uffd: Userfault,
    arena: Arc<Arena>,
    granule_bytes: usize,
    /// Which pages have a page-table entry, as far as it is ours to say. Held across the system
    /// call that changes it, so that the two never differ.
    shown: Mutex<BitVec>,
    /// Pages behind which something else is mapped than the object has there. They are not shown.
    astray: Mutex<Vec<PgoffRange>>,
}

impl ViewMap {
    pub(super) fn new(object: &Inner) -> Result<Self, Error> {
        let op = Op::MapView;
        if !object.arena.has_files() {
            return Err(Error::new(op, ErrorKind::Unsupported)
                .because("a pool on the heap has no file that could be mapped"));
        }
        let uffd = Userfault::open()?;
        let size = object.pages.len_bytes();
        let granule = object.reservation.pool().view_granule();
        let align = granule.max(FolioSize::Huge2M).bytes();
        let map = Mapping::of_nothing(op, object.identity.as_fd(), size, align)?;
        let granule_bytes = index(granule.bytes().get());
        let shown = Mutex::new(try_bits(op, object.pages.nr_pages())?);
        let (arena, astray) = (Arc::clone(&object.arena), Mutex::default());
        Ok(Self { map, uffd, arena, granule_bytes, shown, astray })
    }

    /// Puts a folio behind the pages. Nothing of it is shown when this returns.
    ///
    /// Until it is registered a raw pointer can touch the folio. So the caller installs no folio that
    /// anybody has written to in a view whose address is known, and scrubs it afterwards.
    pub(super) fn install(
        &self,
        object: &Inner,
        pages: PgoffRange,
        pfn: Pfn,
    ) -> Result<(), NotInstalled> {
        let no_file = |error: Error| NotInstalled::Undone(error.on(pages));
        let frames = PfnRange::new(pfn, pages.nr_pages()).map_err(no_file)?;
        let (fd, file_at) = self
            .arena
            .file_of(frames)
            .ok_or_else(|| no_file(Error::new(Op::MapView, ErrorKind::Unsupported)))?;
        let (at, len) = bytes(pages);
        self.map.map_over(at, len, fd, file_at).map_err(NotInstalled::Undone)?;
        self.is_right(pages);
        let opened = self.register(at, len);
        opened.map_err(|error| match self.map.map_over(at, len, object.identity.as_fd(), 0) {
            Ok(()) => NotInstalled::Undone(error),
            Err(_) => NotInstalled::Left(error),
        })
    }

    /// Puts another folio behind pages of which nothing is shown, in a view whose address is known. The old
    /// one and this one may hold what nobody may see: not even for a moment does either show, and no store
    /// of a raw pointer gets lost in one of them. For that moment the fault is a `SIGSEGV`.
    pub(super) fn exchange(
        &self,
        object: &Inner,
        pages: PgoffRange,
        pfn: Pfn,
    ) -> Result<(), Error> {
        let (at, len) = bytes(pages);
        let frames = PfnRange::new(pfn, pages.nr_pages())?;
        let (fd, file_at) = self
            .arena
            .file_of(frames)
            .ok_or_else(|| Error::new(Op::MapView, ErrorKind::Unsupported))?;
        let exhausted = |_| Error::new(Op::MapView, ErrorKind::Exhausted);
        // Should it have to be undone, and that fail.
        self.astray().try_reserve(1).map_err(exhausted)?;
        self.map.map_inaccessible(at, len, fd, file_at)?;
        self.is_right(pages);
        let outcome = self.register(at, len).and_then(|()| self.map.make_accessible(at, len));
        if outcome.is_err() {
            // Inaccessible is as good as hidden, should this fail too.
            let _ = self.map.map_over(at, len, object.identity.as_fd(), 0);
        }
        outcome
    }

    /// An [`exchange`](Self::exchange) could not be undone: the pages stay hidden until something else is put
    /// there.
    pub(super) fn goes_astray(&self, pages: PgoffRange) {
        self.is_right(pages);
        let mut astray = self.astray();
        // An exchange that had no room here has changed nothing.
        if astray.try_reserve(1).is_ok() {
            astray.push(pages);
        }
    }

    fn is_right(&self, pages: PgoffRange) {
        self.astray().retain(|astray| astray.intersection(&pages).is_none());
    }

    fn astray(&self) -> MutexGuard<'_, Vec<PgoffRange>> {
        self.astray.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes what is mapped at the pages answer with SIGBUS.
    fn register(&self, at: usize, len: usize) -> Result<(), Error> {
        self.map.keep_private(at, len)?;
        self.map.forbid_collapse(at, len)?;
        self.uffd.register(&self.map, at, len)?;
        // Whatever was touched before it was registered is mapped, and stays so if left alone.
        self.map.discard(at, len)
    }

    /// Gives the pages their entries. Should the kernel have no memory for page tables, the pages
    /// go on faulting, which is safe, and `shown` says so.
    pub(super) fn show(&self, pages: PgoffRange) {
        let astray = self.astray();
        let mut rest = Some(pages);
        // In ascending order or not: whatever lies between the first one and the start is shown.
        while let Some(part) = rest {
            let first = astray.iter().filter_map(|astray| astray.intersection(&part));
            let Some(first) = first.min_by_key(|astray| astray.start()) else {
                return self.show_all(part);
            };
            if let Some(before) = between(part.start(), first.start()) {
                self.show_all(before);
            }
            rest = between(first.end(), part.end());
        }
    }

    fn show_all(&self, pages: PgoffRange) {
        let mut shown = self.shown();
        let (at, len) = bytes(pages);
        let done = self.uffd.map_pages(&self.map, at, len, self.granule_bytes).is_ok();
        set(&mut shown, pages, done);
        if !done {
            // Whatever was mapped of them is taken out again, to agree with `shown`.
            let _ = self.map.discard(at, len);
        }
    }

    /// Takes the pages' entries away.
    pub(super) fn hide(&self, pages: PgoffRange) -> Result<(), Error> {
        let mut shown = self.shown();
        let (at, len) = bytes(pages);
        self.map.discard(at, len)?;
        set(&mut shown, pages, false);
        Ok(())
    }

    /// Takes the folio behind the pages away.
    pub(super) fn remove(&self, object: &Inner, pages: PgoffRange) -> Result<(), Error> {
        let (at, len) = bytes(pages);
        self.map.map_over(at, len, object.identity.as_fd(), 0)?;
        self.is_right(pages);
        Ok(())
    }

    /// Which pages the kernel's page tables really have, for the audit.
    pub(super) fn present(&self, nr_pages: usize) -> std::io::Result<Vec<bool>> {
        crate::os::pagemap::present(self.map.hva(), nr_pages)
    }

    pub(super) fn shown(&self) -> MutexGuard<'_, BitVec> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a folio could not be installed, and what of it is left.
pub(super) enum NotInstalled {
    /// Nothing.
    Undone(Error),
    /// A mapping that may show the folio to raw pointers, or bytes that they may have written.
    Left(Error),
}

impl NotInstalled {
    fn into_error(self) -> Error {
        match self {
            Self::Undone(error) | Self::Left(error) => error,
        }
    }
}

impl fmt::Debug for ViewMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ViewMap({}+{:#x})", self.map.hva(), self.map.len())
    }
}

fn set(shown: &mut BitVec, pages: PgoffRange, value: bool) {
    let range = index(pages.start().get())..index(pages.end().get());
    if let Some(bits) = shown.get_mut(range) {
        bits.fill(value);
    }
}

/// Where the pages are in a mapping of the whole object. The object fits in an address space, or
/// there would be no view.
fn bytes(pages: PgoffRange) -> (usize, usize) {
    (index(pages.start_offset().get()), index(pages.len_bytes().get()))
}

/// A whole object mapped into this process.
///
/// Raw pointers into it are the caller's affair: they are valid addresses as long as the view lives,
/// and a touch of private or absent memory is a `SIGBUS` (`BUS_ADRERR`, exact address), which kills
/// the process unless somebody handles it; in the moment in which a folio [moves](GuestMemfd::migrate) it is a `SIGSEGV`
/// (`SEGV_ACCERR`). System calls on such memory get `EFAULT`. Children of a fork do not inherit the mapping.
#[derive(Debug)]
pub struct HostView {
    // Before `memfd`, since fields are dropped in this order: the object may be the last to know the
    // frames, and gives them back when it goes.
    map: Arc<ViewMap>,
    memfd: GuestMemfd,
    key: usize,
}

/// What a [`HostView::touch`] met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    /// The byte that is there.
    Byte(u8),
    /// A `SIGBUS`.
    Fault(HostFault),
}

/// A `SIGBUS`, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HostFault {
    /// The address that was touched, as the kernel reports it.
    pub hva: Hva,
    /// Where in the object that is.
    pub offset: Offset,
    /// What the kernel gave as the reason.
    pub cause: FaultCause,
}

impl GuestMemfd {
    /// Maps the whole object. Shared pages get folios first, so that a raw access to one never
    /// faults.
    ///
    /// # Errors
    /// [`ErrorKind::MissingCapability`], which names what userfaultfd lacks on this host;
    /// [`ErrorKind::Unsupported`] for a pool on the heap; [`ErrorKind::Exhausted`] or
    /// [`ErrorKind::Os`] if the process has no room for mappings or descriptors.
    pub fn map_view(&self) -> Result<HostView, Error> {
        let object = &*self.0;
        let mut layout = object.layout.write();
        let map = Arc::new(ViewMap::new(object)?);
        object.populate_shared(Op::MapView, &mut layout, object.pages)?;
        for (pages, frames) in object.frames.folios(object.pages) {
            // Nobody knows its address yet, and if it fails it goes again.
            map.install(object, pages, frames.start()).map_err(NotInstalled::into_error)?;
        }
        let key = layout.views.insert(Arc::clone(&map));
        object.show_shared(&layout, object.pages);
        Ok(HostView { map, memfd: self.clone(), key })
    }
}

impl Inner {
    /// Gives every shared page of the range a folio.
    pub(super) fn populate_shared(
        &self,
        op: Op,
        layout: &mut super::layout::Layout,
        range: PgoffRange,
    ) -> Result<(), Error> {
        let words = self.spans(range).map(|(pages, word)| (pages, word.visibility()));
        for (pages, visibility) in super::object::runs(words) {
            if visibility == Visibility::Shared {
                self.populate(op, layout, pages)?;
            }
        }
        Ok(())
    }
}

impl HostView {
    /// The object that is mapped.
    pub fn memfd(&self) -> &GuestMemfd {
        &self.memfd
    }

    /// How many bytes are mapped: the object's size.
    pub fn size(&self) -> ByteSize {
        self.memfd.size()
    }

    /// Where the object's first byte is mapped; a multiple of 2 MiB.
    pub fn hva(&self) -> Hva {
        self.map.map.hva()
    }

    /// Where a byte of the object is mapped; `None` past the end.
    pub fn hva_of(&self, at: Offset) -> Option<Hva> {
        if at.get() >= self.size().get() {
            return None;
        }
        self.hva().checked_add(ByteSize::from_bytes(at.get()))
    }

    /// A raw pointer to `len` bytes of the object; `None` if they are not all inside. Whether they
    /// can be touched is for the caller to know: see [`GuestMemfd::pin`].
    pub fn pointer(&self, at: Offset, len: ByteSize) -> Option<std::ptr::NonNull<u8>> {
        let end = at.checked_add(len)?;
        if end.get() > self.size().get() {
            return None;
        }
        let base = self.map.map.base().as_ptr();
        std::ptr::NonNull::new(base.wrapping_add(usize::try_from(at.get()).ok()?))
    }

    /// Whether all of the pages are mapped now. If they are pinned they stay so.
    #[cfg_attr(not(feature = "vm-memory"), expect(dead_code, reason = "for the adapter"))]
    pub(crate) fn shows(&self, pages: PgoffRange) -> bool {
        let range = index(pages.start().get())..index(pages.end().get());
        self.map.shown().get(range).is_some_and(|shown| shown.all())
    }

    /// Copies bytes out of shared memory; as [`GuestMemfd::read`].
    ///
    /// # Errors
    /// As [`GuestMemfd::read`].
    #[inline]
    pub fn read(&self, at: Offset, buf: &mut [u8]) -> Result<(), Error> {
        self.memfd.read(at, buf)
    }

    /// Copies bytes into shared memory; as [`GuestMemfd::write`].
    ///
    /// # Errors
    /// As [`GuestMemfd::write`].
    #[inline]
    pub fn write(&self, at: Offset, buf: &[u8]) -> Result<(), Error> {
        self.memfd.write(at, buf)
    }

    /// An atomic load of shared memory; as [`GuestMemfd::load_u64`].
    ///
    /// # Errors
    /// As [`GuestMemfd::load_u64`].
    pub fn load_u64(&self, at: Offset) -> Result<u64, Error> {
        self.memfd.load_u64(at)
    }

    /// An atomic store to shared memory; as [`GuestMemfd::store_u64`].
    ///
    /// # Errors
    /// As [`GuestMemfd::store_u64`].
    pub fn store_u64(&self, at: Offset, value: u64) -> Result<(), Error> {
        self.memfd.store_u64(at, value)
    }

    /// Touches one byte as a raw pointer would, and survives: a load, or a store of what is there.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`] past the end; [`ErrorKind::Busy`] if a `SIGBUS` that somebody sent is
    /// blocked and pending, since the touch would let it through.
    pub fn touch(
        &self,
        handler: SigbusHandler,
        at: Offset,
        access: Access,
    ) -> Result<Touch, Error> {
        let op = match access {
            Access::Read => Op::Read,
            Access::Write => Op::Write,
        };
        let out_of_range = || Error::new(op, ErrorKind::OutOfRange);
        let place = usize::try_from(at.get()).map_err(|_| out_of_range())?;
        match handler.touch(&self.map.map, place, access) {
            Ok(byte) => Ok(Touch::Byte(byte)),
            Err(NotTouched::OutOfRange) => Err(out_of_range()),
            Err(NotTouched::SignalPending) => {
                Err(Error::new(op, ErrorKind::Busy).because("a SIGBUS is pending"))
            }
            Err(NotTouched::Fault(RawFault { hva, cause })) => {
                let into = hva.get().wrapping_sub(self.hva().get());
                Ok(Touch::Fault(HostFault { hva, offset: Offset::new(into as u64), cause }))
            }
        }
    }
}

impl Drop for HostView {
    fn drop(&mut self) {
        self.memfd.0.layout.write().views.try_remove(self.key);
    }
}
