//! The guest's program: asks for a command by loads that leave the guest, does it, and tells what
//! came of it by stores that leave the guest.

/// Where the program's page is.
pub(crate) const AT: u64 = pkvm_oracle::PROGRAM.0;
/// Where the command is read, and the answer written.
pub(crate) const COMMAND: u64 = pkvm_oracle::COMMAND.0;
/// What to do; then four registers, x0 to x3.
pub(crate) const NR_WORDS: usize = 5;
/// The answer, x0 to x3. x0 comes last.
pub(crate) const ANSWER: u64 = COMMAND + 64;
/// ESR_EL1 of an exception.
pub(crate) const EXCEPTION: u64 = COMMAND + 128;
/// Both are within this many bytes.
pub(crate) const COMMAND_BYTES: u64 = 256;

/// Loads a byte from x0.
pub(crate) const LOAD: u64 = 1;
/// Stores x1 as a byte to x0.
pub(crate) const STORE: u64 = 2;
/// `hvc #0` with x0 to x3.
pub(crate) const CALL: u64 = 3;
/// Branches to x0, and expects to come back.
pub(crate) const EXECUTE: u64 = 4;

#[rustfmt::skip]
const CODE: &[u32] = &[
    0xd2a1_2014, //         movz x20, #0x0900, lsl #16   COMMAND
    0xd2a2_000a, //         movz x10, #0x1000, lsl #16   AT
    0xf281_000a, //         movk x10, #0x800
    0xd518_c00a, //         msr  vbar_el1, x10
    0xd503_3fdf, //         isb
    0xf940_0289, // next:   ldr  x9, [x20]
    0xf940_0680, //         ldr  x0, [x20, #8]
    0xf940_0a81, //         ldr  x1, [x20, #16]
    0xf940_0e82, //         ldr  x2, [x20, #24]
    0xf940_1283, //         ldr  x3, [x20, #32]
    0xf100_053f, //         cmp  x9, #1
    0x5400_0100, //         b.eq load
    0xf100_093f, //         cmp  x9, #2
    0x5400_0100, //         b.eq store
    0xf100_0d3f, //         cmp  x9, #3
    0x5400_0120, //         b.eq call
    0xd63f_0000, //         blr  x0
    0xd280_0000, //         mov  x0, #0
    0x1400_0007, //         b    answer
    0x3940_0000, // load:   ldrb w0, [x0]
    0x1400_0005, //         b    answer
    0x3900_0001, // store:  strb w1, [x0]
    0xd280_0000, //         mov  x0, #0
    0x1400_0002, //         b    answer
    0xd400_0002, // call:   hvc  #0
    0xf900_2681, // answer: str  x1, [x20, #72]
    0xf900_2a82, //         str  x2, [x20, #80]
    0xf900_2e83, //         str  x3, [x20, #88]
    0xf900_2280, //         str  x0, [x20, #64]
    0x17ff_ffe8, //         b    next
];
const NEXT: usize = 5;

/// Sixteen vectors of 32 instructions, in the second half of the page.
const VECTORS: usize = 0x800 / 4;
const NR_VECTORS: usize = 16;
const VECTOR_WORDS: usize = 0x80 / 4;

#[rustfmt::skip]
const VECTOR: &[u32] = &[
    0xd538_5200, // mrs  x0, esr_el1
    0xf900_4280, // str  x0, [x20, #128]
];

/// The words of the page, from its start, with where they go.
pub(crate) fn words() -> impl Iterator<Item = (usize, u32)> {
    let vectors = (0..NR_VECTORS).flat_map(|vector| {
        let at = VECTORS + vector * VECTOR_WORDS;
        let back = (at + VECTOR.len(), branch(at + VECTOR.len(), NEXT));
        let body = VECTOR.iter().enumerate().map(move |(word, code)| (at + word, *code));
        body.chain([back])
    });
    CODE.iter().copied().enumerate().chain(vectors)
}

/// `b`, from one word to another.
fn branch(from: usize, to: usize) -> u32 {
    // Two's complement in 26 bits.
    let words = (to as u32).wrapping_sub(from as u32);
    0x1400_0000 | (words & 0x03ff_ffff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn branches_are_encoded_as_the_assembler_does() {
        assert_eq!(branch(29, NEXT), CODE[29]);
        assert_eq!(branch(18, 25), CODE[18]);
    }

    #[test]
    fn the_program_fits_its_page() {
        let words: Vec<_> = words().collect();
        assert!(CODE.len() <= VECTORS);
        assert_eq!(words.len(), CODE.len() + NR_VECTORS * (VECTOR.len() + 1));
        assert!(words.iter().all(|(at, _)| *at < 1024));
    }

    #[test]
    fn the_program_knows_its_addresses() {
        let movz = |code: u32| u64::from(code >> 5 & 0xffff) << 16;
        assert_eq!(movz(CODE[0]), COMMAND);
        assert_eq!(movz(CODE[1]), AT);
        assert_eq!(CODE[2] >> 5 & 0xffff, VECTORS as u32 * 4);
        // str x0, [x20, #offset]: scaled by 8.
        let offset = |code: u32| u64::from(code >> 10 & 0xfff) * 8;
        assert_eq!(COMMAND + offset(CODE[28]), ANSWER);
        assert_eq!(COMMAND + offset(VECTOR[1]), EXCEPTION);
    }
}
