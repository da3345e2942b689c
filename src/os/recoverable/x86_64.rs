//! The routines for x86-64. Design, promises and why they are in assembly: the file above.
//!
//! Every routine keeps in r8 and r10 where it is in arena memory, the same twice if there is one such
//! place only, and in r9 how many bytes there. It changes none of the three, nor the stack, once it may fault.

use std::arch::global_asm;

use libc::{REG_R8, REG_R9, REG_R10, REG_RAX, REG_RDX, REG_RIP, greg_t, ucontext_t};

use super::Interrupted;
use crate::geometry::index;

// One piece of a copy: so many bytes from rsi to rdi by way of a register.
macro_rules! step {
    ($bytes:literal, $load:literal, $store:literal) => {
        concat!(
            $load,
            "\n",
            $store,
            "\n",
            "add rsi, ",
            $bytes,
            "\n",
            "add rdi, ",
            $bytes,
            "\n",
            "sub rcx, ",
            $bytes,
            "\n",
        )
    };
}

// From rsi to rdi, rcx bytes. `$arena` is the pointer of the two that is brought to a multiple of 8 first.
// Single bytes and runs in between go word by word, long ones by what the machine has for them; a
// string instruction of whole words is only as fast as one of bytes where both sides are aligned.
macro_rules! copy {
    ($arena:literal, $arena_low:literal, $other_low:literal) => {
        concat!(
            concat!("test ", $arena_low, ", 7\n"),
            "jz 5f\n",
            concat!("test ", $arena_low, ", 1\n"),
            "jz 2f\n",
            "test rcx, rcx\n",
            "jz 9f\n",
            step!("1", "mov al, byte ptr [rsi]", "mov byte ptr [rdi], al"),
            concat!("2: test ", $arena_low, ", 2\n"),
            "jz 3f\n",
            "cmp rcx, 2\n",
            "jb 8f\n",
            step!("2", "mov ax, word ptr [rsi]", "mov word ptr [rdi], ax"),
            concat!("3: test ", $arena_low, ", 4\n"),
            "jz 5f\n",
            "cmp rcx, 4\n",
            "jb 7f\n",
            step!("4", "mov eax, dword ptr [rsi]", "mov dword ptr [rdi], eax"),
            // Aligned.
            "5: cmp rcx, 32\n",
            "jb 6f\n",
            "cmp rcx, 512\n",
            "jae 4f\n",
            "3: mov rax, qword ptr [rsi]\n",
            "mov rdx, qword ptr [rsi + 8]\n",
            "mov qword ptr [rdi], rax\n",
            "mov qword ptr [rdi + 8], rdx\n",
            "mov rax, qword ptr [rsi + 16]\n",
            "mov rdx, qword ptr [rsi + 24]\n",
            "mov qword ptr [rdi + 16], rax\n",
            "mov qword ptr [rdi + 24], rdx\n",
            "add rsi, 32\n",
            "add rdi, 32\n",
            "sub rcx, 32\n",
            "cmp rcx, 32\n",
            "jae 3b\n",
            // Less than 32 bytes.
            "6: cmp rcx, 8\n",
            "jb 6f\n",
            step!("8", "mov rax, qword ptr [rsi]", "mov qword ptr [rdi], rax"),
            "jmp 6b\n",
            // Less than 8.
            "6: test cl, 4\n",
            "jz 7f\n",
            step!("4", "mov eax, dword ptr [rsi]", "mov dword ptr [rdi], eax"),
            "7: test cl, 2\n",
            "jz 8f\n",
            step!("2", "mov ax, word ptr [rsi]", "mov word ptr [rdi], ax"),
            "8: test cl, 1\n",
            "jz 9f\n",
            "mov al, byte ptr [rsi]\n",
            "mov byte ptr [rdi], al\n",
            "9: xor eax, eax\n",
            "xor edx, edx\n",
            "ret\n",
            // Many.
            concat!("4: test ", $other_low, ", 7\n"),
            "jnz 3f\n",
            "mov edx, ecx\n",
            "shr rcx, 3\n",
            "rep movsq\n",
            "mov ecx, edx\n",
            "and ecx, 7\n",
            "jmp 6b\n",
            "3: rep movsb\n",
            "jmp 9b\n",
        )
    };
}

global_asm!(
    ".pushsection .text.gmem_recoverable, \"ax\", @progbits",
    // Visible to other objects of this crate, which may not be compiled as one, and to nobody else.
    ".irp name, begin, end, recover, touch_load, touch_store, copy_out, copy_in, copy_frames, zero, \
     is_zero, load, store, load_ordered, store_ordered, compare_exchange",
    ".weak gmem01_\\name",
    ".hidden gmem01_\\name",
    ".endr",
    "gmem01_begin:",
    "gmem01_touch_load:",
    "mov r8, rdi",
    "mov r10, rdi",
    "mov r9d, 1",
    "movzx eax, byte ptr [rdi]",
    "xor edx, edx",
    "ret",
    // A store of the same value must be one instruction, or it could undo somebody else's store.
    "gmem01_touch_store:",
    "mov r8, rdi",
    "mov r10, rdi",
    "mov r9d, 1",
    "xor eax, eax",
    "lock xadd byte ptr [rdi], al",
    "xor edx, edx",
    "ret",
    ".p2align 5",
    "gmem01_copy_out:",
    "mov r8, rsi",
    "mov r10, rsi",
    "mov r9, rdx",
    "mov rcx, rdx",
    copy!("rsi", "sil", "dil"),
    ".p2align 5",
    "gmem01_copy_in:",
    "mov r8, rdi",
    "mov r10, rdi",
    "mov r9, rdx",
    "mov rcx, rdx",
    copy!("rdi", "dil", "sil"),
    "gmem01_copy_frames:",
    "mov r8, rsi",
    "mov r10, rdi",
    "mov r9, rdx",
    "mov rcx, rdx",
    "shr rcx, 3",
    "rep movsq",
    "jmp 9f",
    "gmem01_zero:",
    "mov r8, rdi",
    "mov r10, rdi",
    "mov r9, rsi",
    "mov rcx, rsi",
    "shr rcx, 3",
    "xor eax, eax",
    "rep stosq",
    "9: xor eax, eax",
    "xor edx, edx",
    "ret",
    "gmem01_is_zero:",
    "mov r8, rdi",
    "mov r10, rdi",
    "mov r9, rsi",
    "2: mov rax, qword ptr [rdi]",
    "mov rdx, qword ptr [rdi + 8]",
    "or rax, qword ptr [rdi + 16]",
    "or rdx, qword ptr [rdi + 24]",
    "or rax, qword ptr [rdi + 32]",
    "or rdx, qword ptr [rdi + 40]",
    "or rax, qword ptr [rdi + 48]",
    "or rdx, qword ptr [rdi + 56]",
    "or rax, rdx",
    "jnz 3f",
    "add rdi, 64",
    "sub rsi, 64",
    "jnz 2b",
    "3: xor edx, edx",
    "ret",
    // A plain load is sequentially consistent here, since the store is not plain.
    "gmem01_load:",
    "gmem01_load_ordered:",
    "mov r8, rdi",
    "mov r10, rdi",
    "mov r9d, 8",
    "mov rax, qword ptr [rdi]",
    "xor edx, edx",
    "ret",
    "gmem01_store:",
    "mov r8, rdi",
    "mov r10, rdi",
    "mov r9d, 8",
    "mov qword ptr [rdi], rsi",
    "xor edx, edx",
    "ret",
    "gmem01_store_ordered:",
    "mov r8, rdi",
    "mov r10, rdi",
    "mov r9d, 8",
    "xchg qword ptr [rdi], rsi",
    "xor edx, edx",
    "ret",
    "gmem01_compare_exchange:",
    "mov r8, rdi",
    "mov r10, rdi",
    "mov r9d, 8",
    "mov rax, rsi",
    "lock cmpxchg qword ptr [rdi], rdx",
    "xor edx, edx",
    "gmem01_end:",
    "gmem01_recover:",
    "ret",
    ".popsection",
);

pub(super) fn interrupted(context: &ucontext_t) -> Interrupted {
    let register = |number: i32| index(context.uc_mcontext.gregs[number as usize] as u64);
    Interrupted {
        pc: register(REG_RIP),
        places: [register(REG_R8), register(REG_R10)],
        len: register(REG_R9),
    }
}

pub(super) fn resume(context: &mut ucontext_t, pc: usize, value: usize, code: u64) {
    let registers = &mut context.uc_mcontext.gregs;
    registers[REG_RAX as usize] = value as greg_t;
    registers[REG_RDX as usize] = code as greg_t;
    registers[REG_RIP as usize] = pc as greg_t;
}
