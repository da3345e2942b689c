//! A guest with an object of 4 MiB under a hypervisor, and what is to be left of it.

use gmem::addr::{ByteSize, Ipa, Offset, Pgoff};
use gmem::audit;
use gmem::geometry::FolioSize;
use gmem::hyp::{
    Exit, HostStat, HvcResult, Hypervisor, Model, RawHost, Registers, Vcpu, Vm, VmKind,
};
use gmem::range::PgoffRange;
use gmem::{ArenaBacking, ContentPolicy, FolioPool, GuestMemfd, PartSpec, Visibility, Zone};

pub(crate) const PAGE: u64 = 4096;
/// Where guests see their objects: a block may begin there.
pub(crate) const BASE: u64 = 0x4000_0000;

pub(crate) struct World {
    pub(crate) pool: FolioPool,
    pub(crate) hyp: Hypervisor,
    pub(crate) memfd: GuestMemfd,
    pub(crate) vm: Vm,
}

impl World {
    pub(crate) fn new(
        model: impl Into<Model>,
        kind: VmKind,
        folio: FolioSize,
        initial: Visibility,
    ) -> Self {
        let model = model.into();
        let part = |mib| PartSpec::new([ArenaBacking::Heap], ByteSize::from_mib(mib));
        let pool = FolioPool::builder()
            .part(part(12), Zone::Normal)
            .part(part(8), Zone::Movable)
            .create()
            .unwrap();
        let hyp = Hypervisor::with(&pool, model).unwrap();
        let memfd = GuestMemfd::builder(ByteSize::from_mib(4))
            .folio_size(folio)
            .initial(initial)
            .zones(&[Zone::Normal, Zone::Movable])
            .create(&pool)
            .unwrap();
        let vm = match kind {
            VmKind::Protected => hyp.create_vm().unwrap(),
            VmKind::NonProtected => hyp.create_non_protected_vm().unwrap(),
        };
        assert_eq!((vm.kind(), hyp.model()), (kind, model));
        vm.bind(Ipa::new(BASE).gfn(), &memfd, memfd.pages()).unwrap();
        Self { pool, hyp, memfd, vm }
    }

    pub(crate) fn protected(model: impl Into<Model>) -> Self {
        Self::new(model, VmKind::Protected, FolioSize::Base, Visibility::Private)
    }

    /// With a guest that is not protected.
    pub(crate) fn plain(model: impl Into<Model>, folio: FolioSize) -> Self {
        Self::new(model, VmKind::NonProtected, folio, Visibility::Shared)
    }

    pub(crate) fn vcpu(&self) -> Vcpu {
        self.vm.create_vcpu().unwrap()
    }

    pub(crate) fn raw(&self) -> RawHost {
        self.hyp.raw_host()
    }

    pub(crate) fn convert(
        &self,
        range: PgoffRange,
        to: Visibility,
    ) -> Result<(), gmem::error::Error> {
        self.memfd.convert(range, to, ContentPolicy::Preserve).map(|_| ())
    }

    #[track_caller]
    pub(crate) fn sound(&self) {
        let report = audit::check_under(&self.pool, &[&self.memfd], &self.hyp);
        assert_eq!(report.to_string(), "clean");
    }

    /// Nothing is left, and nothing of anybody in it.
    #[track_caller]
    pub(crate) fn end(self) {
        let Self { pool, hyp, memfd, vm } = self;
        drop(vm);
        assert_eq!(hyp.stat(), HostStat::default());
        assert_eq!(audit::check_under(&pool, &[&memfd], &hyp).to_string(), "clean");
        drop(memfd);
        assert_eq!(pool.stat().free, pool.stat().capacity);
        assert_eq!(pool.verify_scrubbed().unwrap(), pool.stat().capacity);
    }
}

pub(crate) fn range(page: u64, nr: u64) -> PgoffRange {
    PgoffRange::new(Pgoff::new(page), nr).unwrap()
}

pub(crate) fn ipa(page: u64) -> Ipa {
    Ipa::new(BASE + page * PAGE)
}

pub(crate) fn at(page: u64) -> Offset {
    Pgoff::new(page).offset()
}

pub(crate) fn pages(nr: u64) -> ByteSize {
    ByteSize::from_pages(nr)
}

/// The guest asks, and the VMM does it.
#[track_caller]
pub(crate) fn agreed(vcpu: &mut Vcpu, call: impl Into<Registers>) -> HvcResult {
    match vcpu.hvc(call) {
        Err(Exit::Conversion(request)) => drop(request.convert().unwrap()),
        other => panic!("no conversion was asked for: {other:?}"),
    }
    vcpu.answer().unwrap()
}
