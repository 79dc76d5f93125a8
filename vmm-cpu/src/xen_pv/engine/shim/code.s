// The in-guest fast path. mod.rs says what it is for, where it lies, and the rules that it keeps.
//
// Two pages of code lie at the start of each virtual processor's part of the shim's slot, its data behind them. The
// second page, and the kernel view of the first, are in kernel roots; the user view of the first page is in user roots.
// All addresses are relative to RIP, so the same bytes serve every virtual processor, the low halves of four addresses
// excepted (`patch_*`), which are filled in.

.pushsection .rodata.vmm_cpu_xen_pv_shim, "a", @progbits
.balign 16
.globl vmm_cpu_xen_pv_shim_image
.hidden vmm_cpu_xen_pv_shim_image
vmm_cpu_xen_pv_shim_image:
.Lshim:

// The data page; data.rs has the same fields in the same order.
.set DATA, .Lshim + 0x2000
.set kernel_root_slot, DATA + 0x000
.set kernel_root, DATA + 0x008
.set user_root, DATA + 0x010
.set kernel_sp, DATA + 0x018
.set mode, DATA + 0x020
.set other_gs, DATA + 0x028
.set syscall_rip, DATA + 0x030
.set fault_rip, DATA + 0x038
.set fault_masks, DATA + 0x040
.set info, DATA + 0x048
.set window, DATA + 0x050
.set marks, DATA + 0x058
.set frames, DATA + 0x060
.set map_frames, DATA + 0x068
.set m2p, DATA + 0x070
.set alone, DATA + 0x078
.set enabled, DATA + 0x080
.set kind, DATA + 0x088
.set flush, DATA + 0x090
.set flush_va, DATA + 0x098
.set saved_rax, DATA + 0x0a0
.set saved_rbx, DATA + 0x0a8
.set saved_rcx, DATA + 0x0b0
.set saved_rdx, DATA + 0x0b8
.set saved_rsi, DATA + 0x0c0
.set saved_rdi, DATA + 0x0c8
.set saved_rbp, DATA + 0x0d0
.set saved_rsp, DATA + 0x0d8
.set saved_r8, DATA + 0x0e0
.set saved_r9, DATA + 0x0e8
.set saved_r10, DATA + 0x0f0
.set saved_r11, DATA + 0x0f8
.set saved_r12, DATA + 0x100
.set saved_r13, DATA + 0x108
.set saved_r14, DATA + 0x110
.set saved_r15, DATA + 0x118
.set saved_rip, DATA + 0x120
.set saved_rflags, DATA + 0x128
.set saved_cs, DATA + 0x130
.set saved_ss, DATA + 0x138
.set saved_error, DATA + 0x140
.set saved_cr2, DATA + 0x148
.set to_rax, DATA + 0x150
.set to_rcx, DATA + 0x158
.set to_r11, DATA + 0x160
// The next five are a frame for IRETQ.
.set to_rip, DATA + 0x168
.set to_cs, DATA + 0x170
.set to_rflags, DATA + 0x178
.set to_rsp, DATA + 0x180
.set to_ss, DATA + 0x188
.set to_gs, DATA + 0x190
.set to_other_gs, DATA + 0x198
.set to_mask, DATA + 0x1a0
.set fast_hypercalls, DATA + 0x1a8
.set fast_system_calls, DATA + 0x1b0
.set fast_faults, DATA + 0x1b8
.set fast_returns, DATA + 0x1c0
// Frames for IRETQ to the shim's own entries: RIP, CS, RFLAGS, RSP, SS.
.set frame_trap, DATA + 0x1c8
.set frame_fault, DATA + 0x1f0
.set frame_hypercall, DATA + 0x218
.set flat_user, DATA + 0x240
.set syscall_masks, DATA + 0x248
.set vcpus, DATA + 0x250
.set frame_protection, DATA + 0x258
.set base, DATA + 0x290
.set null_gs, DATA + 0x298
.set protection_rax, DATA + 0x280
.set zero, DATA + 0x288
.set STACK_END, DATA + 0x1000
.set DOORBELL, DATA + 0x2000
.set EXCEPTION_FRAME_END, DATA + 0x1800

// Bytes of the instruction that traps.
.set TRAP_SIZE, 6

.set MODE_USER, 1
.set KIND_HYPERCALL, 1
.set KIND_TRAP, 2
.set KIND_FAULT, 3
.set KIND_PROTECTION, 4
.set FLUSH_PAGE, 1
.set FLUSH_ALL, 2

.set PTE_PRESENT, 0x001
.set PTE_WRITABLE, 0x002
.set PTE_USER, 0x004
.set PTE_ACCESSED_DIRTY, 0x060
.set PTE_LARGE, 0x080
.set PTE_GLOBAL_BIT, 8

.set MARK_LEVEL, 7
.set MARK_USER_ROOT, 0x20
.set MARK_KERNEL_ROOT, 0x40

// Xen's numbers; data.rs looks whether they are those of the ABI.
.set NR_MMU_UPDATE, 1
.set NR_STACK_SWITCH, 3
.set NR_MULTICALL, 13
.set NR_UPDATE_VA_MAPPING, 14
.set NR_IRET, 23
.set NR_VCPU_OP, 24
.set NR_SET_SEGMENT_BASE, 25
.set NR_MMUEXT_OP, 26
.set DOMID_SELF, 0x7ff0
.set MMU_MACHPHYS_UPDATE, 1
.set MMU_PT_UPDATE_PRESERVE_AD, 2
.set MMUEXT_NEW_BASEPTR, 5
.set MMUEXT_TLB_FLUSH_LOCAL, 6
.set MMUEXT_INVLPG_LOCAL, 7
.set MMUEXT_TLB_FLUSH_MULTI, 8
.set MMUEXT_INVLPG_MULTI, 9
.set MMUEXT_TLB_FLUSH_ALL, 10
.set MMUEXT_INVLPG_ALL, 11
.set MMUEXT_NEW_USER_BASEPTR, 15
.set SEGBASE_GS_USER, 1
.set SEGBASE_GS_KERNEL, 2
.set SEGBASE_GS_USER_SEL, 3
.set UVMF_INVLPG, 2
.set VCPUOP_IS_UP, 3
.set VGCF_IN_SYSCALL, 0x100
.set INFO_PENDING, 0
.set INFO_MASK, 1
.set INFO_CR2, 16
.set FLAT_CS64, 0xe033
.set FLAT_SS64, 0xe02b

.set RFLAGS_IF, 0x200
// TF, IOPL, NT, VM, AC and what does not exist: the fast path leaves them alone.
.set RFLAGS_SLOW, ~0x210ed7

// ---- First page, kernel view: offset 0 is where SYSCALL arrives. The user view has `user_syscall` there.
        jmp     hypercall
        .balign 16

// What the user view holds at offset 0: RCX, R11 and RAX are the program's, so it traps without touching a register.
user_syscall:
        div     byte ptr [rip + user_syscall + 0x20]
user_syscall_end:
        // At 0x20 of the page in both views.
.org .Lshim + 0x20
        .quad   0
.org .Lshim + 0x30

// What the user view holds at `leave_user`: the last steps into a program, in ring 3 and on the user root.
user_landing:
        mov     rax, r11
        mov     r11d, 0x246
        jmp     rcx
user_landing_end:
        .balign 16

// ---- Ring 0. Few instructions, since some processors below take their time for each.

// Exceptions of programs, user root. What returns from here is the shim alone, since RIP comes from a frame that no program
// can reach, and CR3 from a slot that none can.
user_trap:
        xchg    rax, [rip + kernel_root_slot]
user_trap_swapped:
        mov     cr3, rax
        lea     rsp, [rip + frame_trap]
        iretq
user_fault:
        xchg    rax, [rip + kernel_root_slot]
user_fault_swapped:
        mov     cr3, rax
        mov     rax, cr2
        lea     rsp, [rip + frame_fault]
        iretq
// General protection faults of the guest kernel: some are instructions that it need not be given up for.
kernel_protection:
        lea     rsp, [rip + frame_protection]
        iretq
gates_end:

// Divide errors on the kernel root: four are the shim's own, by which it asks for what ring 3 cannot do.
kernel_trap:
        cmp     dword ptr [rsp], 0x11111111
patch_leave_user:
        jne     1f
        mov     cr3, rax
        iretq
1:      cmp     dword ptr [rsp], 0x11111111
patch_leave_user_whole:
        jne     2f
        mov     cr3, rax
        mov     rax, [rip + to_rax]
        lea     rsp, [rip + to_rip]
        iretq
2:      cmp     dword ptr [rsp], 0x11111111
patch_load_root:
        jne     3f
        mov     cr3, rax
        add     qword ptr [rsp], TRAP_SIZE
        iretq
3:      cmp     dword ptr [rsp], 0x11111111
patch_flush_page:
        jne     4f
        invlpg  [rax]
        add     qword ptr [rsp], TRAP_SIZE
        iretq
        // A divide error of the guest kernel. (The port of exception 0.)
4:      out     0x40, al
        .balign 64

// ---- Ring 3, end of the first page: the instructions that trap to `kernel_trap`.

// To a program, after a system call: RAX is the user root, RCX where it goes on, R11 its RAX. The processor comes back to
// this address, where the user root has `user_landing`.
leave_user:
        div     byte ptr [rip + zero]
        .balign 16
leave_user_whole:
        div     byte ptr [rip + zero]
load_root:
        div     byte ptr [rip + zero]
        ret
flush_page:
        div     byte ptr [rip + zero]
        ret

.org .Lshim + 0x1000, 0xcc
// ---- Second page, ring 3 on the kernel root.

// SYSCALL of the guest kernel. On some processors it has entered ring 0.
hypercall:
        mov     [rip + saved_rax], rax
        mov     [rip + saved_rbx], rbx
        mov     [rip + saved_rdx], rdx
        mov     [rip + saved_rsi], rsi
        mov     [rip + saved_rdi], rdi
        mov     [rip + saved_rbp], rbp
        mov     [rip + saved_rsp], rsp
        mov     [rip + saved_r8], r8
        mov     [rip + saved_r9], r9
        mov     [rip + saved_r10], r10
        mov     [rip + saved_r12], r12
        mov     [rip + saved_r13], r13
        mov     [rip + saved_r14], r14
        mov     [rip + saved_r15], r15
        mov     [rip + saved_rcx], rcx
        mov     [rip + saved_rip], rcx
        mov     [rip + saved_r11], r11
        mov     [rip + saved_rflags], r11
        mov     dword ptr [rip + kind], KIND_HYPERCALL
hypercall_saved:
        mov     eax, cs
        test    al, 3
        jnz     1f
        lea     rsp, [rip + frame_hypercall]
        iretq
hypercall_ring3:
1:      lea     rsp, [rip + STACK_END]
        mov     dword ptr [rip + flush], 0
        cmp     dword ptr [rip + enabled], 0
        je      slow
        test    r11, RFLAGS_SLOW
        jnz     slow
        mov     rax, [rip + saved_rax]
        cmp     rax, NR_IRET
        je      iret
        cmp     rax, NR_MULTICALL
        je      multicall
        call    one_call
answer:
        mov     [rip + to_rax], rax
        inc     qword ptr [rip + fast_hypercalls]
        mov     eax, [rip + flush]
        test    eax, eax
        jz      2f
        cmp     eax, FLUSH_ALL
        je      1f
        mov     rax, [rip + flush_va]
        call    flush_page
        jmp     2f
1:      mov     rax, [rip + kernel_root]
        call    load_root
2:      mov     rcx, [rip + saved_rip]
        mov     r11, [rip + saved_rflags]
        mov     [rip + to_rcx], rcx
        mov     [rip + to_rip], rcx
        mov     [rip + to_r11], r11
        mov     [rip + to_rflags], r11
        mov     rax, [rip + saved_rsp]
        mov     [rip + to_rsp], rax
        jmp     go_on_kernel

// Gives the call, or whatever the shim began with, to the VMM, which does it from the start: what was done so far is done
// again with the same effect.
slow:
        mov     [rip + DOORBELL], al
        ud2

// One hypercall: number in RAX, arguments in RDI, RSI, RDX and R10; the answer comes in RAX. Changes all but R12 to R15.
one_call:
        cmp     rax, NR_MMU_UPDATE
        je      mmu_update
        cmp     rax, NR_MMUEXT_OP
        je      mmuext_op
        cmp     rax, NR_SET_SEGMENT_BASE
        je      set_segment_base
        cmp     rax, NR_STACK_SWITCH
        je      stack_switch
        cmp     rax, NR_UPDATE_VA_MAPPING
        je      update_va_mapping
        cmp     rax, NR_VCPU_OP
        jne     slow

// Whether a virtual processor is up that is not there (Linux asks for 8192): ENOENT.
        cmp     rdi, VCPUOP_IS_UP
        jne     slow
        mov     eax, esi
        cmp     rax, rsi
        jne     slow
        cmp     eax, [rip + vcpus]
        jb      slow
        mov     rax, -2
        ret

stack_switch:
        mov     [rip + kernel_sp], rsi
        xor     eax, eax
        ret

// which in RDI, base in RSI
set_segment_base:
        cmp     rdi, SEGBASE_GS_USER_SEL
        je      2f
        mov     rax, rsi
        shl     rax, 16
        sar     rax, 16
        cmp     rax, rsi
        jne     slow
        test    rdi, rdi
        jz      1f
        cmp     rdi, SEGBASE_GS_USER
        je      3f
        cmp     rdi, SEGBASE_GS_KERNEL
        jne     slow
        wrgsbase rsi
        xor     eax, eax
        ret
1:      wrfsbase rsi
        xor     eax, eax
        ret
        // A null selector where there is one already. Others are the VMM's to load.
2:      test    rsi, rsi
        jnz     slow
        cmp     dword ptr [rip + null_gs], 0
        je      slow
3:      mov     [rip + other_gs], rsi
        xor     eax, eax
        ret

// list in RDI, count in RSI, where the number of those done goes in RDX, foreign domain in R10
mmu_update:
        cmp     r10d, DOMID_SELF
        jne     slow
        mov     r11d, esi
        cmp     r11d, 512
        ja      slow
1:      sub     esi, 1
        jb      4f
        mov     r8, [rdi]
        mov     r9, [rdi + 8]
        add     rdi, 16
        mov     ecx, r8d
        and     ecx, 3
        and     r8, -8
        cmp     ecx, MMU_MACHPHYS_UPDATE
        je      3f
        call    check_entry
        cmp     ecx, MMU_PT_UPDATE_PRESERVE_AD
        je      2f
        mov     [r8], r9
        jmp     1b
        // Accessed and dirty bits stay, also those that a processor sets at this moment.
2:      mov     rax, [r8]
        mov     rbx, rax
        and     ebx, PTE_ACCESSED_DIRTY
        or      rbx, r9
        lock cmpxchg [r8], rbx
        jne     2b
        jmp     1b
        // The machine-to-physical table.
3:      mov     rax, r8
        shr     rax, 12
        cmp     rax, [rip + frames]
        jae     slow
        mov     rbx, [rip + m2p]
        mov     [rbx + rax * 8], r9
        jmp     1b
4:      test    rdx, rdx
        jz      5f
        mov     [rdx], r11d
5:      xor     eax, eax
        ret

// An entry that is to be stored: its guest-physical address in R8, which becomes the address in the window, and its value
// in R9, which gets the form that the ABI gives it. Changes RAX, RBX, R10.
check_entry:
        mov     rax, r8
        shr     rax, 12
        cmp     rax, [rip + frames]
        jae     slow
        add     rax, [rip + marks]
        movzx   ebx, byte ptr [rax]
        and     ebx, MARK_LEVEL
        cmp     ebx, 4
        jne     1f
        // Slots 256 to 271 are not the guest's.
        mov     eax, r8d
        and     eax, 0xf80
        cmp     eax, 0x800
        je      slow
1:      test    r9b, PTE_PRESENT
        jz      3f
        mov     rax, r9
        shl     rax, 12
        shr     rax, 24
        mov     r10, [rip + marks]
        cmp     ebx, 1
        ja      2f
        cmp     rax, [rip + map_frames]
        jae     slow
        jmp     4f
        // A table, which has to be known as one of the level below.
2:      cmp     rax, [rip + frames]
        jae     slow
        test    r9b, PTE_LARGE
        jnz     slow
        movzx   eax, byte ptr [r10 + rax]
        and     eax, MARK_LEVEL
        inc     eax
        cmp     eax, ebx
        jne     slow
        jmp     5f
4:      cmp     ebx, 1
        jne     5f
        test    r9b, PTE_WRITABLE
        jz      5f
        // Memory that becomes writable is no table any more. The frames beyond RAM are none.
        cmp     rax, [rip + frames]
        jae     5f
        cmp     byte ptr [r10 + rax], 0
        jne     slow
5:      or      r9, PTE_USER
        btr     r9, PTE_GLOBAL_BIT
3:      add     r8, [rip + window]
        ret

// address in RDI, entry in RSI, flags in RDX
update_va_mapping:
        mov     rax, rdi
        shl     rax, 16
        sar     rax, 16
        cmp     rax, rdi
        jne     slow
        // Slots 256 to 271 of the root.
        mov     rax, rdi
        shr     rax, 43
        and     eax, 0x1f
        cmp     eax, 0x10
        je      slow
        cmp     rdx, UVMF_INVLPG
        ja      slow
        mov     r8, [rip + kernel_root]
        mov     ecx, 39
1:      mov     rax, rdi
        shr     rax, cl
        and     eax, 0x1ff
        lea     r8, [r8 + rax * 8]
        mov     rax, r8
        shr     rax, 12
        cmp     rax, [rip + frames]
        jae     slow
        cmp     ecx, 12
        je      2f
        add     r8, [rip + window]
        mov     r8, [r8]
        test    r8b, PTE_PRESENT
        jz      slow
        test    r8b, PTE_LARGE
        jnz     slow
        shl     r8, 12
        shr     r8, 24
        shl     r8, 12
        sub     ecx, 9
        jmp     1b
2:      mov     r9, rsi
        call    check_entry
        mov     [r8], r9
        test    edx, edx
        jz      3f
        cmp     edx, UVMF_INVLPG
        je      want_flush_page
        mov     dword ptr [rip + flush], FLUSH_ALL
3:      xor     eax, eax
        ret

// Notes that the page in RDI is to be flushed.
want_flush_page:
        cmp     dword ptr [rip + flush], 0
        jne     1f
        mov     dword ptr [rip + flush], FLUSH_PAGE
        mov     [rip + flush_va], rdi
        xor     eax, eax
        ret
1:      mov     dword ptr [rip + flush], FLUSH_ALL
        xor     eax, eax
        ret

// list in RDI, count in RSI, where the number of those done goes in RDX, foreign domain in R10
mmuext_op:
        cmp     r10d, DOMID_SELF
        jne     slow
        mov     r11d, esi
        cmp     r11d, 64
        ja      slow
        mov     r8, rdi
1:      sub     esi, 1
        jb      9f
        mov     eax, [r8]
        mov     rdi, [r8 + 8]
        mov     r9, [r8 + 16]
        add     r8, 24
        mov     r10, [rip + marks]
        cmp     eax, MMUEXT_NEW_BASEPTR
        je      2f
        cmp     eax, MMUEXT_NEW_USER_BASEPTR
        je      3f
        cmp     eax, MMUEXT_TLB_FLUSH_LOCAL
        je      5f
        cmp     eax, MMUEXT_INVLPG_LOCAL
        je      6f
        // Those that reach other virtual processors: none are there, or they are the VMM's.
        cmp     dword ptr [rip + alone], 0
        je      slow
        cmp     eax, MMUEXT_TLB_FLUSH_ALL
        je      5f
        cmp     eax, MMUEXT_INVLPG_ALL
        je      6f
        cmp     eax, MMUEXT_TLB_FLUSH_MULTI
        je      4f
        cmp     eax, MMUEXT_INVLPG_MULTI
        jne     slow
        test    byte ptr [r9], 1
        jz      1b
        jmp     6f
        // A kernel root that the engine has prepared.
2:      cmp     rdi, [rip + frames]
        jae     slow
        movzx   eax, byte ptr [r10 + rdi]
        and     eax, MARK_LEVEL | MARK_KERNEL_ROOT
        cmp     eax, 4 | MARK_KERNEL_ROOT
        jne     slow
        shl     rdi, 12
        mov     [rip + kernel_root], rdi
        mov     [rip + kernel_root_slot], rdi
        jmp     5f
3:      test    rdi, rdi
        jz      slow
        cmp     rdi, [rip + frames]
        jae     slow
        movzx   eax, byte ptr [r10 + rdi]
        and     eax, MARK_LEVEL | MARK_USER_ROOT
        cmp     eax, 4 | MARK_USER_ROOT
        jne     slow
        shl     rdi, 12
        mov     [rip + user_root], rdi
        jmp     1b
4:      test    byte ptr [r9], 1
        jz      1b
5:      mov     dword ptr [rip + flush], FLUSH_ALL
        jmp     1b
6:      mov     rax, rdi
        shl     rax, 16
        sar     rax, 16
        cmp     rax, rdi
        jne     5b
        call    want_flush_page
        jmp     1b
9:      test    rdx, rdx
        jz      1f
        mov     [rdx], r11d
1:      xor     eax, eax
        ret

// list in RDI, count in RSI
multicall:
        mov     r12, rdi
        mov     r13d, esi
        cmp     r13d, 64
        ja      slow
1:      sub     r13d, 1
        jb      2f
        mov     rax, [r12]
        mov     rdi, [r12 + 16]
        mov     rsi, [r12 + 24]
        mov     rdx, [r12 + 32]
        mov     r10, [r12 + 40]
        call    one_call
        mov     [r12 + 8], rax
        add     r12, 64
        jmp     1b
2:      xor     eax, eax
        jmp     answer

// The frame at the guest's RSP: RAX, R11, RCX, flags, RIP, CS, RFLAGS, RSP, SS.
iret:
        mov     rbx, [rip + saved_rsp]
        mov     rax, [rbx]
        mov     [rip + to_rax], rax
        mov     r11, [rbx + 8]
        mov     rcx, [rbx + 16]
        mov     r8, [rbx + 24]
        mov     rsi, [rbx + 32]
        movzx   edi, word ptr [rbx + 40]
        mov     rdx, [rbx + 48]
        mov     rax, [rbx + 56]
        movzx   r9d, word ptr [rbx + 64]
        mov     [rip + to_rsp], rax
        test    rdx, RFLAGS_SLOW
        jnz     slow
        mov     [rip + to_rip], rsi
        // Whether events are masked; one that waits is delivered by the VMM.
        mov     r10, [rip + info]
        mov     eax, 1
        test    edx, RFLAGS_IF
        jz      1f
        xor     eax, eax
        cmp     byte ptr [r10 + INFO_PENDING], 0
        jne     slow
1:      mov     [rip + to_mask], eax
        or      edx, RFLAGS_IF | 2
        mov     [rip + to_rflags], rdx
        // Of a system call: RCX and R11 are RIP and RFLAGS.
        test    r8d, VGCF_IN_SYSCALL
        jz      2f
        mov     rcx, rsi
        mov     r11, rdx
2:      mov     [rip + to_rcx], rcx
        mov     [rip + to_r11], r11
        test    edi, 3
        jz      iret_kernel
        // The guest's own selectors, if they are flat, or Xen's.
        cmp     edi, 0x33
        jne     3f
        cmp     r9d, 0x2b
        jne     slow
        cmp     dword ptr [rip + flat_user], 0
        je      slow
        test    r8d, VGCF_IN_SYSCALL
        jz      4f
        // As SYSRET, which has no choice.
        mov     edi, FLAT_CS64
        mov     r9d, FLAT_SS64
        jmp     4f
3:      cmp     edi, FLAT_CS64
        jne     slow
        cmp     r9d, FLAT_SS64
        jne     slow
4:      cmp     qword ptr [rip + user_root], 0
        je      slow
        mov     rax, rsi
        shr     rax, 47
        jnz     slow
        mov     [rip + to_cs], rdi
        mov     [rip + to_ss], r9
        rdgsbase rax
        mov     [rip + to_other_gs], rax
        mov     rax, [rip + other_gs]
        mov     [rip + to_gs], rax
        inc     qword ptr [rip + fast_returns]
        jmp     go_on_user

iret_kernel:
        cmp     edi, 0xe030
        jne     slow
        or      r9d, 3
        cmp     r9d, FLAT_SS64
        jne     slow
        inc     qword ptr [rip + fast_returns]
        jmp     go_on_masking

// ---- The ends. Nothing that the guest sees has changed before them but memory, in ways that can be repeated; from their
// first instruction on, what is to be lies in `saved_*` and `to_*`, and the VMM can take it from there.

// Those registers that the guest finds as they were.
.macro restore_unchanged
        mov     rbx, [rip + saved_rbx]
        mov     rdx, [rip + saved_rdx]
        mov     rsi, [rip + saved_rsi]
        mov     rdi, [rip + saved_rdi]
        mov     rbp, [rip + saved_rbp]
        mov     r8, [rip + saved_r8]
        mov     r9, [rip + saved_r9]
        mov     r10, [rip + saved_r10]
        mov     r12, [rip + saved_r12]
        mov     r13, [rip + saved_r13]
        mov     r14, [rip + saved_r14]
        mov     r15, [rip + saved_r15]
.endm

// Into mode user. RCX and R11 are not needed by a program that made a system call (its flag is in R8).
go_on_user:
        mov     eax, [rip + to_mask]
        mov     [r10 + INFO_MASK], al
        mov     rax, [rip + to_other_gs]
        mov     [rip + other_gs], rax
        mov     rax, [rip + to_gs]
        wrgsbase rax
        mov     dword ptr [rip + mode], MODE_USER
        test    r8d, VGCF_IN_SYSCALL
        lea     rsp, [rip + to_rflags]
        restore_unchanged
        mov     rcx, [rip + to_rcx]
        mov     rax, [rip + user_root]
        jz      1f
        popfq
        mov     rsp, [rip + to_rsp]
        mov     r11, [rip + to_rax]
        jmp     leave_user
1:      mov     r11, [rip + to_r11]
        jmp     leave_user_whole

// Into mode kernel, from a program.
go_on_entry:
        mov     r10, [rip + info]
        mov     rax, [rip + to_other_gs]
        mov     [rip + other_gs], rax
        mov     rax, [rip + to_gs]
        wrgsbase rax
        mov     dword ptr [rip + mode], 0
go_on_masking:
        mov     eax, [rip + to_mask]
        mov     [r10 + INFO_MASK], al
go_on_kernel:
        mov     rax, [rip + to_rax]
        mov     rcx, [rip + to_rcx]
        restore_unchanged
        mov     r11, [rip + to_r11]
        lea     rsp, [rip + to_rflags]
        popfq
        mov     rsp, [rip + to_rsp]
        jmp     [rip + to_rip]
go_on_end:

// ---- Entries from programs. RAX is the kernel root, or the address that faulted; the program's RAX is in the slot.
// Nothing else may change before all is saved.
.macro save_program what
        mov     [rip + saved_rax], rax
        mov     [rip + saved_rbx], rbx
        mov     [rip + saved_rcx], rcx
        mov     [rip + saved_rdx], rdx
        mov     [rip + saved_rsi], rsi
        mov     [rip + saved_rdi], rdi
        mov     [rip + saved_rbp], rbp
        mov     [rip + saved_r8], r8
        mov     [rip + saved_r9], r9
        mov     [rip + saved_r10], r10
        mov     [rip + saved_r11], r11
        mov     [rip + saved_r12], r12
        mov     [rip + saved_r13], r13
        mov     [rip + saved_r14], r14
        mov     [rip + saved_r15], r15
        mov     dword ptr [rip + kind], \what
.endm

// RIP, CS, RFLAGS, RSP and SS of what was interrupted, to RSI, RDI, RDX, R8 and R9 too.
.macro copy_frame
        mov     rsi, [rip + EXCEPTION_FRAME_END - 40]
        mov     rdi, [rip + EXCEPTION_FRAME_END - 32]
        mov     rdx, [rip + EXCEPTION_FRAME_END - 24]
        mov     r8, [rip + EXCEPTION_FRAME_END - 16]
        mov     r9, [rip + EXCEPTION_FRAME_END - 8]
        mov     [rip + saved_rip], rsi
        mov     [rip + saved_cs], rdi
        mov     [rip + saved_rflags], rdx
        mov     [rip + saved_rsp], r8
        mov     [rip + saved_ss], r9
.endm

fault:
        mov     [rip + saved_cr2], rax
        mov     rax, [rip + kernel_root]
        xchg    rax, [rip + kernel_root_slot]
fault_swapped:
        save_program KIND_FAULT
fault_saved:
        mov     rbx, [rip + EXCEPTION_FRAME_END - 48]
        mov     [rip + saved_error], rbx
        mov     ecx, KIND_FAULT
        jmp     1f
trap:
        xchg    rax, [rip + kernel_root_slot]
trap_swapped:
        save_program KIND_TRAP
trap_saved:
        mov     ecx, KIND_TRAP
1:      copy_frame
program_saved:
        lea     rsp, [rip + STACK_END]
        mov     r10, [rip + info]
        mov     rbx, [rip + kernel_sp]
        and     rbx, -16
        movzx   eax, byte ptr [r10 + INFO_MASK]
        cmp     ecx, KIND_FAULT
        je      page_fault
        lea     rcx, [rip + .Lshim]
        cmp     rsi, rcx
        jne     slow

// SYSCALL of a program: RCX, R11, RIP, CS and the mask, RFLAGS, RSP, SS.
        cmp     qword ptr [rip + syscall_rip], 0
        je      slow
        mov     rcx, [rip + saved_rcx]
        mov     r11, [rip + saved_r11]
        test    r11, RFLAGS_SLOW
        jnz     slow
        mov     edi, FLAT_CS64
        mov     r9d, FLAT_SS64
        mov     r10d, [rip + syscall_masks]
        or      r10d, eax
        mov     [rip + to_mask], r10d
        sub     rbx, 56
        mov     [rbx], rcx
        mov     [rbx + 8], r11
        mov     [rip + to_r11], r11
        mov     [rip + to_rcx], rcx
        mov     rsi, rcx
        mov     rdx, r11
        mov     rcx, [rip + syscall_rip]
        mov     [rip + to_rip], rcx
        lea     rcx, [rbx + 16]
        inc     qword ptr [rip + fast_system_calls]
        jmp     1f

// A page fault of a program: the same with the error code, which says that it came from a program.
page_fault:
        cmp     qword ptr [rip + fault_rip], 0
        je      slow
        movzx   edi, di
        movzx   r9d, r9w
        cmp     edi, FLAT_CS64
        je      2f
        cmp     edi, 0x33
        jne     slow
        cmp     dword ptr [rip + flat_user], 0
        je      slow
2:      mov     rcx, [rip + fault_rip]
        mov     [rip + to_rip], rcx
        mov     ecx, [rip + fault_masks]
        or      ecx, eax
        mov     [rip + to_mask], ecx
        mov     rcx, [rip + saved_cr2]
        mov     [r10 + INFO_CR2], rcx
        sub     rbx, 64
        mov     rcx, [rip + saved_rcx]
        mov     [rbx], rcx
        mov     [rip + to_rcx], rcx
        mov     rcx, [rip + saved_r11]
        mov     [rbx + 8], rcx
        mov     [rip + to_r11], rcx
        mov     ecx, [rip + saved_error]
        or      ecx, 4
        mov     [rbx + 16], rcx
        lea     rcx, [rbx + 24]
        inc     qword ptr [rip + fast_faults]

1:      mov     [rip + to_rsp], rbx
        mov     [rcx], rsi
        mov     [rcx + 8], edi
        mov     [rcx + 12], eax
        and     edx, ~0x3200
        xor     eax, 1
        shl     eax, 9
        or      eax, edx
        mov     [rcx + 16], rax
        mov     [rcx + 24], r8
        mov     [rcx + 32], r9
        // AC, RF, NT, DF and TF are clear in the kernel.
        and     edx, ~0x54500
        or      edx, RFLAGS_IF | 2
        mov     [rip + to_rflags], rdx
        mov     rax, [rip + saved_rax]
        mov     [rip + to_rax], rax
        rdgsbase rax
        mov     [rip + to_other_gs], rax
        mov     rax, [rip + other_gs]
        mov     [rip + to_gs], rax
        jmp     go_on_entry

// CLI and STI of the guest kernel do nothing: its interrupts are event channels.
protection:
        mov     [rip + protection_rax], rax
        // One of the shim's own, by an address of the guest's: what is saved is still good.
protection_kept:
        mov     rax, [rip + EXCEPTION_FRAME_END - 40]
        sub     rax, [rip + base]
        cmp     rax, 0x2000
        mov     rax, [rip + protection_rax]
        jb      slow
protection_checked:
        save_program KIND_PROTECTION
protection_saved:
        mov     rbx, [rip + EXCEPTION_FRAME_END - 48]
        mov     [rip + saved_error], rbx
        copy_frame
protection_copied:
        lea     rsp, [rip + STACK_END]
        cmp     dword ptr [rip + enabled], 0
        je      slow
        test    rdx, RFLAGS_SLOW
        jnz     slow
        test    ebx, ebx
        jnz     slow
        cmp     di, FLAT_CS64
        jne     slow
        movzx   eax, byte ptr [rsi]
        and     eax, 0xfe
        cmp     eax, 0xfa
        jne     slow
        inc     rsi
        mov     [rip + to_rip], rsi
        mov     [rip + to_rsp], r8
        mov     [rip + to_rflags], rdx
        mov     rax, [rip + saved_rax]
        mov     [rip + to_rax], rax
        mov     rcx, [rip + saved_rcx]
        mov     [rip + to_rcx], rcx
        mov     r11, [rip + saved_r11]
        mov     [rip + to_r11], r11
        jmp     go_on_kernel
.org .Lshim + 0x2000, 0xcc

// ---- Where things are, for the VMM; code.rs has the same names in the same order.
.globl vmm_cpu_xen_pv_shim_labels
.hidden vmm_cpu_xen_pv_shim_labels
.balign 4
vmm_cpu_xen_pv_shim_labels:
.irp label, user_syscall, user_syscall_end, user_landing, user_landing_end, user_trap, user_trap_swapped, user_fault, user_fault_swapped, kernel_protection, gates_end, kernel_trap, patch_leave_user, patch_leave_user_whole, patch_load_root, patch_flush_page, leave_user, leave_user_whole, load_root, flush_page, hypercall, hypercall_saved, hypercall_ring3, go_on_user, go_on_entry, go_on_masking, go_on_kernel, go_on_end, fault, fault_swapped, fault_saved, trap, trap_swapped, trap_saved, program_saved, protection, protection_kept, protection_checked, protection_saved, protection_copied
        .long   \label - .Lshim
.endr
.popsection
