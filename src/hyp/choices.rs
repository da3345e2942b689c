//! Any bytes, as choices: what hostile hosts and VMs are made of. When they are used up, every choice is the first.

#[derive(Debug)]
pub(crate) struct Choices<'a> {
    left: &'a [u8],
    /// Numbers that nobody should send.
    odd: &'static [u64],
}

impl<'a> Choices<'a> {
    pub(crate) fn new(bytes: &'a [u8], odd: &'static [u64]) -> Self {
        Self { left: bytes, odd }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.left.is_empty()
    }

    pub(crate) fn byte(&mut self) -> u8 {
        match self.left.split_first() {
            Some((&first, rest)) => {
                self.left = rest;
                first
            }
            None => 0,
        }
    }

    /// One of at most 256.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        u64::from(self.byte()) % bound
    }

    pub(crate) fn index(&mut self, len: usize) -> usize {
        usize::from(self.byte()) % len
    }

    pub(crate) fn one_in(&mut self, nr: u64) -> bool {
        self.below(nr) + 1 == nr
    }

    pub(crate) fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.index(all.len())]
    }

    /// Any number at all.
    pub(crate) fn odd(&mut self) -> u64 {
        match usize::from(self.byte()) {
            nth @ ..128 => self.odd[nth % self.odd.len()],
            nth => u64::from_be_bytes([0; 8].map(|_: u8| self.byte())) >> (nth % 64),
        }
    }
}
