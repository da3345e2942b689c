//! A tree seen from outside: all that is in it, and what is wrong with it.

use super::{NODE_BITS, Tree};
use crate::addr::{Gfn, Pfn};
use crate::stage2::pte::{Entry, Level, Pte};

impl Tree {
    /// Stores that made an entry valid which still was, since this was last asked. It is remembered from the first
    /// time on.
    #[cfg(test)]
    pub(crate) fn hasty_stores(&mut self) -> Vec<(Pte, Pte)> {
        let stores = self.trace.replace(Vec::new()).unwrap_or_default();
        stores.into_iter().filter(|(old, new)| old.is_valid() && new.is_valid()).collect()
    }

    /// The frames that are tables, those of the root included.
    pub(crate) fn table_frames(&self) -> impl Iterator<Item = Pfn> {
        let idle: std::collections::HashSet<_> = self.idle.iter().copied().collect();
        let used = self.nodes.iter().enumerate().filter(move |(key, _)| !idle.contains(key));
        used.map(|(_, node)| node.pfn)
    }

    /// How many bytes its tables take, those included that it keeps for later.
    #[cfg(any(test, feature = "oracle"))]
    pub(crate) fn nr_bytes(&self) -> usize {
        size_of_val(&self.entries[..]) + size_of_val(&self.nodes[..])
    }

    /// Every leaf and annotation, in ascending order.
    pub(crate) fn visit(&self, mut see: impl FnMut(Gfn, Level, Pte)) {
        self.visit_in(0, self.shape.root(), 0, &mut see);
    }

    fn visit_in(
        &self,
        table: usize,
        level: Level,
        base: u64,
        see: &mut impl FnMut(Gfn, Level, Pte),
    ) {
        let first = table << NODE_BITS;
        for nth in 0..self.shape.nr_entries(level) {
            let pte = self.entries[first + nth];
            let gfn = base + nth as u64 * self.shape.pages_at(level);
            match pte.next_table(level) {
                Some(next) => self.visit_in(next, level.below(), gfn, see),
                None if pte.is_empty() => {}
                None => see(Gfn::new(gfn), level, pte),
            }
        }
    }

    /// What is wrong with the tree itself.
    pub(crate) fn check(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        let root = (0..self.nr_roots).map(|key| (key, self.shape.root()));
        let mut todo: Vec<_> = root.collect();
        let mut nr_reached = 0;
        while let Some((key, level)) = todo.pop() {
            nr_reached += 1;
            if nr_reached > self.nodes.len() {
                wrong.push("a table is reachable twice".into());
                return wrong;
            }
            let entries = &self.entries[key << NODE_BITS..(key + 1) << NODE_BITS];
            let nr_used = entries.iter().filter(|pte| !pte.is_empty()).count();
            let nr_refs = usize::from(self.nodes[key].nr_refs);
            if nr_refs != nr_used + 1 {
                wrong.push(format!("{level:?} table {key}: {nr_refs} references, {nr_used} used"));
            }
            if nr_used == 0 && key >= self.nr_roots {
                wrong.push(format!("{level:?} table {key} is empty and lives"));
            }
            for pte in entries {
                match pte.decode(level) {
                    Entry::Table(next) if self.idle.contains(&next) => {
                        wrong.push(format!("{level:?} table {key} leads to a table that is gone"));
                    }
                    Entry::Table(next) => todo.push((next, level.below())),
                    Entry::Locked | Entry::Reserved => {
                        wrong.push(format!("{level:?} table {key} has an entry {pte:?}"));
                    }
                    _ => {}
                }
            }
        }
        if nr_reached != self.nr_tables() {
            wrong.push(format!("{nr_reached} of {} tables are reachable", self.nr_tables()));
        }
        wrong
    }
}
