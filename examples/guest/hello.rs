//! A freestanding 64-bit guest: says hello over a 16550 at 0x3f8, tells what machine it sees, computes something
//! whose result is known, and leaves through the ISA debug-exit port.
//!
//! The PVH entry (Xen docs/misc/pvh.pandoc) is 32-bit protected mode with paging off and EBX pointing to
//! `hvm_start_info`. A few instructions of assembly go to long mode and on to privilege level 3, with an I/O
//! permission map that allows IN and OUT: there Rust's own code, which uses SSE as it likes, runs at the processor's
//! speed even on a KVM that emulates privilege level 0.

#![no_std]
#![no_main]

mod runtime;

use core::arch::{asm, global_asm};
use core::fmt::{self, Write};
use core::panic::PanicInfo;

global_asm!(
    r#"
    .section .note.pvh, "a", @note
    .balign 4
    .long 4, 4, 18                   // name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long pvh_start

    .section .text.pvh_start, "ax"
    .code32
    .global pvh_start
pvh_start:
    cld
    // Identity map of the first 4 GiB in pages of 2 MiB.
    mov $pml4, %edi
    mov $pdpt + 7, %eax
    mov %eax, (%edi)
    mov $pdpt, %edi
    mov $directories + 7, %eax
    mov $4, %ecx
1:  mov %eax, (%edi)
    add $0x1000, %eax
    add $8, %edi
    dec %ecx
    jnz 1b
    mov $directories, %edi
    mov $0x87, %eax
    mov $2048, %ecx
2:  mov %eax, (%edi)
    add $0x200000, %eax
    add $8, %edi
    dec %ecx
    jnz 2b
    // Long mode: PAE and OSFXSR, CR3, EFER.LME, PG.
    mov $0x620, %eax
    mov %eax, %cr4
    mov $pml4, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx
    rdmsr
    or $0x100, %eax
    wrmsr
    mov $0x80000011, %eax
    mov %eax, %cr0
    lgdt gdt_pointer
    ljmp $8, $long_mode
    .code64
long_mode:
    mov $0x33, %eax
    mov %eax, %ds
    mov %eax, %es
    mov $16, %eax
    mov %eax, %ss
    mov $stack_top, %esp
    mov %ebx, %edi
    // CPUID is asked at level 0, where every hypervisor answers for itself.
    mov $cpuid_leaves, %esi
    mov $cpuid_answers, %ebp
3:  mov (%rsi), %eax
    xor %ecx, %ecx
    cpuid
    mov %eax, (%rbp)
    mov %ebx, 4(%rbp)
    mov %ecx, 8(%rbp)
    mov %edx, 12(%rbp)
    add $16, %ebp
    add $4, %esi
    cmp $cpuid_leaves_end, %esi
    jb 3b
    // SYSEXIT goes to privilege level 3 in one instruction that every KVM can emulate. AMD processors have it in
    // legacy mode only: there it is #UD, whose handler takes the way by IRETQ.
    mov $invalid_opcode, %eax
    mov %ax, idt_invalid_opcode
    shr $16, %eax
    mov %ax, idt_invalid_opcode + 6
    lidt idt_pointer
    mov $task, %eax
    mov %ax, gdt_task + 2
    shr $16, %eax
    mov %al, gdt_task + 4
    mov $0x38, %eax
    ltr %ax
    mov $0x174, %ecx
    mov $8, %eax
    xor %edx, %edx
    wrmsr
    mov $stack_top - 8, %ecx
    mov $guest_main, %edx
    sysexitq
invalid_opcode:
    push $0x33
    push $stack_top - 8
    push $2
    push $0x2b
    push $guest_main
    iretq

    .section .data.tables, "aw"
    .balign 8
gdt:
    .quad 0
    .quad 0x00af9b000000ffff, 0x00cf93000000ffff    // 0x08, 0x10: level 0, 64-bit code and data
    .quad 0, 0                                      // SYSEXIT counts from 0x08: +16 would be 32-bit code
    .quad 0x00affb000000ffff, 0x00cff3000000ffff    // 0x28, 0x30: level 3, 64-bit code and data
gdt_task:
    .quad 0x0000890000000000 + 104 + 128, 0         // 0x38: task state, its base filled in at run time
gdt_pointer:
    .word . - gdt - 1
    .quad gdt
    .balign 8
idt:
    .skip 6 * 16
idt_invalid_opcode:
    .word 0, 8, 0x8e00, 0
    .quad 0
idt_pointer:
    .word . - idt - 1
    .quad idt
    .balign 8
task:
    .skip 102
    .word 104                                       // the I/O permission map follows: ports below 0x400
    .skip 128
    .byte 0xff

    .balign 4
cpuid_leaves:
    .long 0, 1, 0x40000000, 0x80000000, 0x80000002, 0x80000003, 0x80000004
cpuid_leaves_end:

    .section .bss.tables, "aw", @nobits
    .global cpuid_answers
    .balign 4
cpuid_answers: .skip 7 * 16
    .balign 4096
pml4: .skip 4096
pdpt: .skip 4096
directories: .skip 4 * 4096
    .skip 32768
stack_top:
"#,
    options(att_syntax)
);

/// `hvm_start_info`, version 1 (Xen public/arch-x86/hvm/start_info.h).
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    nr_modules: u32,
    modlist: u64,
    cmdline: u64,
    rsdp: u64,
    memmap: u64,
    memmap_entries: u32,
    reserved: u32,
}

/// `hvm_memmap_table_entry`.
#[repr(C)]
struct MemoryMapEntry {
    addr: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

const START_INFO_MAGIC: u32 = 0x336e_c578;
const COM1: u16 = 0x3f8;
const DEBUG_EXIT: u16 = 0xf4;

/// What the host reads as "all as expected": QEMU's isa-debug-exit turns it into status 33.
const SUCCESS: u32 = 0x10;
const FAILURE: u32 = 0x11;

fn outb(port: u16, value: u8) {
    // SAFETY: writes a port; no device of this machine changes memory for that.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) }
}

fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: reads a port; no device of this machine changes memory for that.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) }
    value
}

fn leave(status: u32) -> ! {
    // SAFETY: as in `outb`.
    unsafe { asm!("out dx, eax", in("dx") DEBUG_EXIT, in("eax") status, options(nomem, nostack)) }
    loop {
        core::hint::spin_loop();
    }
}

struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            // LSR.THRE; bounded, so that a machine without a UART cannot hang the guest.
            for _ in 0..10_000 {
                if inb(COM1 + 5) & 0x20 != 0 {
                    break;
                }
            }
            outb(COM1, byte);
        }
        Ok(())
    }
}

macro_rules! say {
    ($($argument:tt)*) => {{ let _ = writeln!(Serial, $($argument)*); }};
}

fn text_at(address: u64) -> &'static str {
    if address == 0 {
        return "";
    }
    // SAFETY: the loader put a string with a NUL there (hvm_start_info), and all of low memory is mapped.
    let bytes = unsafe { core::ffi::CStr::from_ptr(address as *const _) };
    bytes.to_str().unwrap_or("(not UTF-8)")
}

unsafe extern "C" {
    /// EAX, EBX, ECX, EDX of leaves 0, 1, 0x4000_0000, 0x8000_0000, and 0x8000_0002 to 4.
    static cpuid_answers: [[u32; 4]; 7];
}

fn show_text(label: &str, registers: &[u32]) {
    let _ = write!(Serial, "{label}");
    for byte in registers.iter().flat_map(|register| register.to_le_bytes()) {
        if (0x20..0x7f).contains(&byte) {
            let _ = Serial.write_char(byte as char);
        }
    }
    say!("");
}

fn show_processor() {
    // SAFETY: written once, before Rust code ran, and never again.
    let [basic, features, hypervisor, extended, brand @ ..] = unsafe { &cpuid_answers };
    show_text("  vendor      ", &[basic[1], basic[3], basic[2]]);
    if extended[0] >= 0x8000_0004 && brand.as_flattened().iter().any(|register| *register != 0) {
        show_text("  processor   ", brand.as_flattened());
    }
    if features[2] >> 31 != 0 {
        show_text("  hypervisor  ", &hypervisor[1..]);
    }
}

/// Primes below `LIMIT` by the sieve of Eratosthenes.
fn count_primes() -> usize {
    const LIMIT: usize = 10_000;
    let mut composite = [0_u8; LIMIT];
    let mut count = 0;
    for candidate in 2..LIMIT {
        if composite[candidate] == 0 {
            count += 1;
            let mut multiple = candidate * candidate;
            while multiple < LIMIT {
                composite[multiple] = 1;
                multiple += candidate;
            }
        }
    }
    count
}

#[unsafe(no_mangle)]
extern "C" fn guest_main(start_info: *const StartInfo) -> ! {
    // SAFETY: the PVH entry got this address from the loader; the structure is mapped and never changes.
    let info = unsafe { &*start_info };
    say!("Hello from a guest in 64-bit mode.");
    if info.magic != START_INFO_MAGIC {
        say!("  no start info: magic {:#x}", info.magic);
        leave(FAILURE);
    }
    show_processor();
    say!("  command     {}", text_at(info.cmdline));
    for index in 0..info.memmap_entries as usize {
        // SAFETY: `index` is below the count that the loader gave for this table.
        let entry = unsafe { &*(info.memmap as *const MemoryMapEntry).add(index) };
        let kind = if entry.kind == 1 { "RAM" } else { "reserved" };
        say!("  memory      {:#012x} + {:#012x} {kind}", entry.addr, entry.size);
    }
    let primes = count_primes();
    say!("  primes      {primes} below 10000");
    leave(if primes == 1229 { SUCCESS } else { FAILURE })
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    say!("guest panic: {info}");
    leave(FAILURE)
}
