//! The words of an object without the object: no folios, views, hypervisor or lock of a layout.

use std::sync::Arc;

use gmem::Visibility;
use gmem::error::Error;
use gmem::modelled::{Domain, Reader, Shape, Tree, Wait, Waiters, Wanted};
use gmem::range::PgoffRange;

pub(crate) struct StateOnly {
    tree: Tree,
    reader: Reader,
    never: Wait,
}

impl StateOnly {
    /// All of it shared, in as few words as can be.
    pub(crate) fn new(pages: PgoffRange) -> Result<Self, Error> {
        let shape = Shape::of_pages(pages.nr_pages());
        let tree = Tree::new(shape, Visibility::Shared, &Arc::new(Waiters::new()))?;
        Ok(Self { tree, reader: Domain::register(&Arc::new(Domain::new())), never: Wait::never() })
    }

    /// The steps of a conversion that are about state, as gmem/convert.rs has them.
    pub(crate) fn convert(&self, ranges: &[PgoffRange], to: Visibility) -> u64 {
        let frozen = self.tree.freeze(&self.reader, ranges, Wanted::Other(to), &self.never);
        let mut frozen = frozen.expect("nobody else is here");
        if to == Visibility::Private || frozen.could_merge() {
            assert!(frozen.wait_for_sections(&self.reader));
        }
        let changed_pages = frozen.runs().iter().map(PgoffRange::nr_pages).sum();
        frozen.release(to);
        changed_pages
    }

    /// How many pages have changed, both ways taken together.
    pub(crate) fn both_ways(&self, ranges: &[PgoffRange]) -> u64 {
        self.convert(ranges, Visibility::Private) + self.convert(ranges, Visibility::Shared)
    }
}
