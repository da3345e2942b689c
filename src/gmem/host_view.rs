//! The object mapped into the VMM: shared pages are there, private ones fault.

use std::sync::Arc;

use super::layout::granules;
use super::object::{GuestMemfd, Inner};
use super::view_map::ViewMap;
use super::view_options::{ViewOptions, ViewPath};
use crate::addr::{Access, ByteSize, Hva, Offset, Pgoff};
use crate::error::{Error, ErrorKind, Found, Op};
use crate::geometry::FolioSize;
use crate::identity::ViewId;
use crate::os::recoverable::Fault;
use crate::os::sigbus::views::{self, Decode, Entered, Entry};
use crate::os::sigbus::{FaultReason, HostFault, NotTouched, SigbusHandler};
use crate::range::PgoffRange;
use crate::state::{Phase, Visibility};

/// A whole object mapped into this process.
///
/// Raw pointers into it are the caller's affair: they are valid addresses as long as the view lives,
/// and a touch of private or absent memory is a `SIGBUS` (`BUS_ADRERR`, exact address), which kills
/// the process unless somebody handles it ([`SigbusHandler::decide_by`]); in the moment in which a folio
/// comes there, new or [moved](GuestMemfd::migrate), it is a `SIGSEGV` (`SEGV_ACCERR`), which goes the same way. System calls on such
/// memory get `EFAULT`. Children of a fork do not inherit the mapping.
#[derive(Debug)]
pub struct HostView {
    // Before `map`: once its addresses are somebody else's, nobody is to take them for the view's.
    entered: Entered,
    // Before `memfd`, since fields are dropped in this order: the object may be the last to know the
    // frames, and gives them back when it goes.
    map: Arc<ViewMap>,
    memfd: GuestMemfd,
    key: usize,
    path: ViewPath,
    passed_over: Vec<(ViewPath, Error)>,
}

/// What a [`HostView::touch`] met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    /// The byte that is there.
    Byte(u8),
    /// A `SIGBUS`.
    Fault(HostFault),
}

impl GuestMemfd {
    /// [`map_view_with`](Self::map_view_with), with nothing said otherwise.
    ///
    /// # Errors
    /// As [`map_view_with`](Self::map_view_with).
    pub fn map_view(&self) -> Result<HostView, Error> {
        self.map_view_with(&ViewOptions::default())
    }

    /// Maps the whole object. Shared pages get folios first, so that a raw access to one never fails.
    /// An object may have any number of views, each with options of its own.
    ///
    /// # Errors
    /// [`ErrorKind::MissingCapability`] for a path that this host does not offer, which names what is
    /// missing; [`ErrorKind::Unsupported`] for a pool on the heap; [`ErrorKind::Exhausted`] or
    /// [`ErrorKind::Os`] if the process has no room for mappings or descriptors.
    pub fn map_view_with(&self, options: &ViewOptions) -> Result<HostView, Error> {
        let object = &*self.0;
        let mut layout = object.layout.write();
        let (path, map, passed_over) = object.new_view(options)?;
        let map = Arc::new(map);
        object.populate_shared(Op::MapView, &mut layout, object.pages)?;
        for (pages, frames) in object.frames.folios(object.pages) {
            // If it fails, the view goes again.
            map.install(object, pages, frames.start())?;
        }
        let key = layout.views.insert(Arc::clone(&map));
        object.show_shared(&layout, object.pages);
        let entered = views::enter(Entry {
            object: self.id(),
            view: ViewId::new_unique(),
            start: map.map().hva(),
            size: object.pages.len_bytes(),
            decode: Arc::<Inner>::clone(&self.0),
        });
        Ok(HostView { entered, map, memfd: self.clone(), key, path, passed_over })
    }
}

impl Decode for Inner {
    /// Outside of a section, which a signal handler cannot enter: what is found is a guess.
    fn reason(&self, page: Pgoff) -> FaultReason {
        let word = self.tree.load(page);
        match word {
            Some(word) if word.phase() == Phase::Quarantined => FaultReason::Quarantined,
            Some(word) if !word.is_open() => FaultReason::Private,
            _ if self.frames.frame(page).is_some() => FaultReason::NotShown,
            _ if self.frames.has_folio(page) => FaultReason::Hole,
            _ => FaultReason::Absent,
        }
    }
}

/// A view by some path, and why others that come before it were not to be had.
type Made = (ViewPath, ViewMap, Vec<(ViewPath, Error)>);

impl Inner {
    fn new_view(&self, options: &ViewOptions) -> Result<Made, Error> {
        let new = |path| ViewMap::new(self, path, options.mapping);
        if options.path != ViewPath::Best {
            return Ok((options.path, new(options.path)?, Vec::new()));
        }
        let mut passed_over = Vec::new();
        for path in ViewPath::BY_PREFERENCE {
            match new(path) {
                Ok(map) => return Ok((path, map, passed_over)),
                Err(error) if error.kind() == ErrorKind::MissingCapability => {
                    passed_over.push((path, error));
                }
                Err(error) => return Err(error),
            }
        }
        Err(Error::new(Op::MapView, ErrorKind::MissingCapability))
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

    /// By which number a [`HostFault`] names the view.
    pub fn id(&self) -> ViewId {
        self.entered.entry().view
    }

    /// By what private pages are kept out of reach; never [`ViewPath::Best`].
    pub fn path(&self) -> ViewPath {
        self.path
    }

    /// The paths that [`ViewPath::Best`] would have preferred, and why each could not be had.
    pub fn passed_over(&self) -> &[(ViewPath, Error)] {
        &self.passed_over
    }

    /// The unit in which pages can be touched or fault here. On hugetlb it is that of the huge pages, and a
    /// shared page faults while any neighbour in its unit is private; checked accesses go by 4 KiB there too.
    pub fn granule(&self) -> FolioSize {
        self.memfd.pool().view_granule()
    }

    /// Whether raw pointers can touch all of the range, at this moment. A pin makes the moment last: one of all the
    /// [granules](Self::granule) that the range is in. Of a page alone that is not enough on hugetlb, where a neighbour that
    /// turns private takes it out of the view.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`]; [`ErrorKind::NotShared`] with the first private page;
    /// [`ErrorKind::Unsupported`] for a page that is shared, but cannot be mapped because its
    /// [granule](Self::granule) is not all shared; [`ErrorKind::NotFound`] for one that has no memory yet,
    /// or for whose entry the kernel had none.
    pub fn check_mapped(&self, range: PgoffRange) -> Result<(), Error> {
        let op = Op::MapView;
        let object = &*self.memfd.0;
        object.check_range(op, range)?;
        let _layout = object.layout.read();
        let Some(hidden) = self.map.first_hidden(range) else { return Ok(()) };
        let word = |page| object.word(page).map(|word| word.visibility());
        if word(hidden) == Some(Visibility::Private) {
            let error = Error::new(op, ErrorKind::NotShared).on(range);
            return Err(error.at(hidden.offset(), Found::Private));
        }
        let is_private = |&page: &_| word(page) == Some(Visibility::Private);
        let neighbour = match self.granule() {
            FolioSize::Base => None,
            granule => granules(PgoffRange::single(hidden)?, granule)
                .next()
                .and_then(|pages| pages.iter().find(is_private)),
        };
        match neighbour {
            Some(page) => Err(Error::new(op, ErrorKind::Unsupported)
                .because("a view of hugetlb maps whole huge pages, and part of this one is private")
                .on(range)
                .at(page.offset(), Found::Private)),
            None => Err(Error::new(op, ErrorKind::NotFound).on(range)),
        }
    }

    /// Maps blocks of 2 MiB by one huge entry each where all of their pages are shared and the memory is a
    /// transparent huge page; says how much lies in blocks that were not mapped so before. Blocks that turn
    /// shared as a whole are without being asked; this is for those that did in parts.
    ///
    /// A huge entry saves the TLB, and costs some 30 us when the first page of its block turns private.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfRange`]; [`ErrorKind::Exhausted`] or [`ErrorKind::Os`] if the process has no room
    /// for mappings. The pages are as accessible as before then.
    pub fn regain_huge(&self, range: PgoffRange) -> Result<ByteSize, Error> {
        let object = &*self.memfd.0;
        object.check_range(Op::MapView, range)?;
        let _layout = object.layout.read();
        let mut nr_pages = 0;
        for (pages, frames) in object.frames.resident(range) {
            nr_pages += self.map.regain(object, pages, frames)?;
        }
        Ok(ByteSize::from_pages(nr_pages))
    }

    /// How much is mapped by huge entries of transparent huge pages, by the kernel's account. Takes a look at
    /// every mapping of the process.
    pub fn huge(&self) -> ByteSize {
        self.map.huge()
    }

    /// How many bytes are mapped: the object's size.
    pub fn size(&self) -> ByteSize {
        self.memfd.size()
    }

    /// Where the object's first byte is mapped; a multiple of 2 MiB.
    pub fn hva(&self) -> Hva {
        self.map.map().hva()
    }

    /// Where a byte of the object is mapped; `None` past the end.
    pub fn hva_of(&self, at: Offset) -> Option<Hva> {
        if at.get() >= self.size().get() {
            return None;
        }
        self.hva().checked_add(ByteSize::from_bytes(at.get()))
    }

    /// A raw pointer to `len` bytes of the object; `None` if they are not all inside. Whether they
    /// can be touched is for the caller to know: see [`GuestMemfd::pin`] and [`check_mapped`](Self::check_mapped).
    pub fn pointer(&self, at: Offset, len: ByteSize) -> Option<std::ptr::NonNull<u8>> {
        let end = at.checked_add(len)?;
        if end.get() > self.size().get() {
            return None;
        }
        let base = self.map.map().base().as_ptr();
        std::ptr::NonNull::new(base.wrapping_add(usize::try_from(at.get()).ok()?))
    }

    /// Whether all of the pages are mapped now. If they are pinned, and whole granules, they stay so.
    pub(crate) fn shows(&self, pages: PgoffRange) -> bool {
        self.map.first_hidden(pages).is_none()
    }

    /// Maps pages that are pinned and not [mapped](Self::shows): the kernel may have had no room, or no memory for what
    /// somebody has taken, when they turned shared.
    #[cfg_attr(not(feature = "vm-memory"), expect(dead_code, reason = "for the adapter"))]
    pub(crate) fn show_again(&self, pages: PgoffRange) -> Result<(), Error> {
        if !self.shows(pages) {
            let object = &*self.memfd.0;
            object.show_shared(&object.layout.write(), pages);
        }
        self.check_mapped(pages)
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
        match handler.touch(self.map.map(), place, access) {
            Ok(byte) => Ok(Touch::Byte(byte)),
            Err(NotTouched::OutOfRange) => Err(out_of_range()),
            Err(NotTouched::SignalPending) => {
                Err(Error::new(op, ErrorKind::Busy).because("a SIGBUS is pending"))
            }
            Err(NotTouched::Fault(Fault { hva, cause })) => {
                Ok(Touch::Fault(self.entered.entry().decode(hva, cause)))
            }
        }
    }
}

impl Drop for HostView {
    fn drop(&mut self) {
        self.memfd.0.layout.write().views.try_remove(self.key);
    }
}
