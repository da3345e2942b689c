//! Any bytes, as choices. When they are used up, every choice is the first.

/// Numbers that nobody should send, but for the smallest.
const ODD: [u64; 18] = [
    0,
    1,
    2,
    511,
    512,
    513,
    0xfff,
    1 << 12,
    1 << 16,
    1 << 28,
    1 << 36,
    1 << 40,
    1 << 52,
    1 << 63,
    i64::MAX as u64,
    u64::MAX >> 12,
    u64::MAX - 0xfff,
    u64::MAX,
];

#[derive(Debug)]
pub(super) struct Choices<'a>(&'a [u8]);

impl<'a> Choices<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((&first, rest)) => {
                self.0 = rest;
                first
            }
            None => 0,
        }
    }

    /// One of at most 256.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        u64::from(self.byte()) % bound
    }

    pub(super) fn index(&mut self, len: usize) -> usize {
        usize::from(self.byte()) % len
    }

    pub(super) fn one_in(&mut self, nr: u64) -> bool {
        self.below(nr) + 1 == nr
    }

    pub(super) fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.index(all.len())]
    }

    /// Any number at all.
    pub(super) fn odd(&mut self) -> u64 {
        match usize::from(self.byte()) {
            nth @ ..128 => ODD[nth % ODD.len()],
            nth => u64::from_be_bytes([0; 8].map(|_: u8| self.byte())) >> (nth % 64),
        }
    }
}
