//! A block becomes a table that maps the same pages: nothing is lost, unlike when a page is put inside of one.

use super::{Found, NODE_BITS, TableEnv, Tree};
use crate::addr::{Gfn, Pfn};
use crate::stage2::pte::{Entry, Level, Pte};
use crate::stage2::walk::TableError;

impl Tree {
    /// Cuts the block that maps a page into entries of the next level. With `breaks` the block is gone and forgotten
    /// before the table is there, which machines need whose CPUs cannot stand both; others see no gap.
    ///
    /// # Errors
    /// [`TableError::Absent`] if nothing maps the page, [`TableError::Invalid`] if no block does;
    /// [`TableError::BeyondIpa`], [`TableError::NoMemory`].
    pub(crate) fn split(
        &mut self,
        gfn: Gfn,
        breaks: bool,
        env: &mut impl TableEnv,
    ) -> Result<(), TableError> {
        let found = self.walk(gfn, Level::PAGE)?;
        let Entry::Leaf(leaf) = found.pte.decode(found.level) else {
            return Err(TableError::Absent);
        };
        if found.level == Level::PAGE {
            return Err(TableError::Invalid);
        }
        let below = found.level.below();
        let pfn = env.take().ok_or(TableError::NoMemory)?;
        let node = self.new_node(pfn);
        let span = self.shape.pages_at(below);
        for nth in 0..self.shape.nr_entries(below) {
            let part = Pfn::new(leaf.pfn.get() + nth as u64 * span);
            self.store((node << NODE_BITS) + nth, Pte::EMPTY, found.pte.part(below, part));
        }
        self.install(gfn, found, Pte::table(node)?, breaks, env);
        Ok(())
    }

    fn install(
        &mut self,
        gfn: Gfn,
        found: Found,
        table: Pte,
        breaks: bool,
        env: &mut impl TableEnv,
    ) {
        if breaks {
            return self.replace(gfn, found, table, env);
        }
        self.store(found.at, found.pte, table);
        let span = self.shape.pages_at(found.level);
        env.invalidate(Gfn::new(gfn.get() & !(span - 1)), span);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stage2::{Leaf, PageState, Prot, TableShape};

    #[derive(Debug, Default)]
    struct Env {
        free: Vec<Pfn>,
        forgotten: Vec<(u64, u64)>,
    }

    impl TableEnv for Env {
        fn take(&mut self) -> Option<Pfn> {
            self.free.pop()
        }
        fn give(&mut self, pfn: Pfn) {
            self.free.push(pfn);
        }
        fn nr_free(&self) -> u64 {
            self.free.len() as u64
        }
        fn invalidate(&mut self, gfn: Gfn, nr_pages: u64) {
            self.forgotten.push((gfn.get(), nr_pages));
        }
    }

    fn tree(env: &mut Env) -> Tree {
        let mut tree = Tree::new(TableShape::IPA_48, Pfn::new(1));
        let leaf = Leaf { pfn: Pfn::new(1 << 18), prot: Prot::RW, state: PageState::Owned };
        tree.map(Gfn::new(0), 1 << 18, Level::BLOCK_1G, leaf, Pte::device, env).unwrap();
        tree
    }

    #[test]
    fn every_page_stays_where_it_was() {
        for breaks in [false, true] {
            let mut env = Env { free: (10..20).map(Pfn::new).collect(), ..Env::default() };
            let mut tree = tree(&mut env);
            let before = tree.get(Gfn::new(0)).unwrap().1;
            tree.trace = Some(Vec::new());
            tree.split(Gfn::new(0x2_3456), breaks, &mut env).unwrap();
            let of_block =
                tree.trace.take().unwrap().into_iter().filter(|&(old, _)| !old.is_empty());
            let steps: Vec<_> = of_block.collect();
            assert_eq!(steps[0].0, before);
            assert_eq!(steps.iter().any(|step| step.1 == Pte::LOCKED), breaks);
            assert_eq!(env.forgotten, [(0, 1 << 18)]);
            tree.split(Gfn::new(0x2_3456), breaks, &mut env).unwrap();
            for gfn in [0, 0x1ff, 0x2_3400, 0x2_3456, 0x2_35ff, 0x3_ffff] {
                let (pfn, leaf) = tree.translate(Gfn::new(gfn)).unwrap();
                assert_eq!((pfn.get(), leaf.prot), (gfn + (1 << 18), Prot::RW), "{gfn:#x}");
            }
            let level_of = |gfn| tree.leaf(Gfn::new(gfn)).unwrap().0;
            assert_eq!((level_of(0x2_3456), level_of(0)), (Level::PAGE, Level::BLOCK_2M));
            let [page, block] = [0x2_3456, 0].map(|gfn| tree.get(Gfn::new(gfn)).unwrap().1);
            assert!(page.is_like(block) && block.is_like(before), "a device's still");
            assert_eq!(tree.check(), [""; 0]);
            assert_eq!(tree.split(Gfn::new(0x2_3456), breaks, &mut env), Err(TableError::Invalid));
        }
    }

    #[test]
    fn without_memory_nothing_changes() {
        let mut env = Env { free: vec![Pfn::new(9)], ..Env::default() };
        let mut tree = tree(&mut env);
        let before = tree.get(Gfn::new(0)).unwrap();
        assert_eq!(tree.split(Gfn::new(5), true, &mut env), Err(TableError::NoMemory));
        assert_eq!(tree.get(Gfn::new(0)).unwrap(), before);
        assert_eq!(tree.split(Gfn::new(1 << 18), true, &mut env), Err(TableError::Absent));
        assert_eq!(tree.split(Gfn::new(1 << 36), true, &mut env), Err(TableError::BeyondIpa));
        assert_eq!(tree.check(), [""; 0]);
    }
}
