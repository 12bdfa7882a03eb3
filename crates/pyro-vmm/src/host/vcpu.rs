//! The smallest guest there is: one virtual processor in 64-bit mode that counts down and halts.

#![expect(unsafe_code, reason = "KVM is driven by ioctls, and by memory that is shared with the kernel")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::thread::JoinHandleExt;
use std::ptr::NonNull;
use std::thread::JoinHandle;

use rustix::mm::{MapFlags, ProtFlags};

// From <linux/kvm.h>, whose numbers are part of the kernel's promise to programs.
const KVM_CREATE_VM: libc::c_ulong = 0xae01;
const KVM_GET_VCPU_MMAP_SIZE: libc::c_ulong = 0xae04;
const KVM_CREATE_VCPU: libc::c_ulong = 0xae41;
const KVM_SET_USER_MEMORY_REGION: libc::c_ulong = 0x4020_ae46;
const KVM_RUN: libc::c_ulong = 0xae80;
const KVM_GET_REGS: libc::c_ulong = 0x8090_ae81;
const KVM_SET_REGS: libc::c_ulong = 0x4090_ae82;
const KVM_GET_SREGS: libc::c_ulong = 0x8138_ae83;
const KVM_SET_SREGS: libc::c_ulong = 0x4138_ae84;
const KVM_SET_SIGNAL_MASK: libc::c_ulong = 0x4004_ae8b;
const KVM_EXIT_HLT: u32 = 5;
/// Where `struct kvm_run` has `exit_reason`.
const EXIT_REASON_OFFSET: usize = 8;

const MEMORY_BYTES: usize = 2 << 20;
const CODE: usize = 0x1000;
const PAGE_TABLES: [usize; 3] = [0x2000, 0x3000, 0x4000];
const DESCRIPTORS: usize = 0x5000;
const STACK_TOP: u64 = 0x1_0000;
const PRESENT_WRITABLE: usize = 0b11;
const PRESENT_WRITABLE_HUGE: usize = 0b1000_0011;
const CODE_DESCRIPTOR: u64 = 0x00af_9b00_0000_ffff;
const DATA_DESCRIPTOR: u64 = 0x00cf_9300_0000_ffff;

/// `mov rcx, imm64`, the count, `again: dec rcx; jnz again; hlt`.
const MOVE_COUNT: [u8; 2] = [0x48, 0xb9];
const COUNT_DOWN_AND_HALT: [u8; 6] = [0x48, 0xff, 0xc9, 0x75, 0xfb, 0xf4];

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Regs {
    rax: u64,
    rbx: u64,
    rcx: u64,
    rdx: u64,
    rsi: u64,
    rdi: u64,
    rsp: u64,
    rbp: u64,
    r8_to_r15: [u64; 8],
    rip: u64,
    rflags: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Segment {
    base: u64,
    limit: u32,
    selector: u16,
    kind: u8,
    present: u8,
    dpl: u8,
    db: u8,
    s: u8,
    l: u8,
    g: u8,
    avl: u8,
    unusable: u8,
    padding: u8,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Table {
    base: u64,
    limit: u16,
    padding: [u16; 3],
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Sregs {
    cs: Segment,
    ds: Segment,
    es: Segment,
    fs: Segment,
    gs: Segment,
    ss: Segment,
    tr: Segment,
    ldt: Segment,
    gdt: Table,
    idt: Table,
    cr0: u64,
    cr2: u64,
    cr3: u64,
    cr4: u64,
    cr8: u64,
    efer: u64,
    apic_base: u64,
    interrupt_bitmap: [u64; 4],
}

#[repr(C)]
struct MemoryRegion {
    slot: u32,
    flags: u32,
    guest_address: u64,
    bytes: u64,
    host_address: u64,
}

/// `struct kvm_signal_mask` with the kernel's own 8-byte set behind it.
#[repr(C)]
struct SignalMask {
    bytes: u32,
    set: [u8; 8],
}

// The kernel checks these sizes: they are part of the numbers above.
const _: () = assert!(size_of::<Regs>() == 0x90 && size_of::<Sregs>() == 0x138);

/// The signal that makes a thread leave its guest. It is blocked there, so it is never delivered.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stop {
    signal: libc::c_int,
}

impl Stop {
    /// Blocks all signals in this thread; those of the process go to its other threads.
    pub(super) fn prepare_thread() -> io::Result<Self> {
        let mut all = std::mem::MaybeUninit::uninit();
        // SAFETY: the set is initialised by the first call before the second reads it.
        let error = unsafe {
            libc::sigfillset(all.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), std::ptr::null_mut())
        };
        match error {
            0 => Ok(Self { signal: libc::SIGRTMIN() }),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }

    /// Makes `thread`, which was prepared, leave its guest.
    pub(super) fn kick<T>(self, thread: &JoinHandle<T>) {
        // SAFETY: a thread that was neither joined nor detached may be named, even when it has ended. The
        // signal is blocked in it, so that it cannot end the process.
        unsafe { libc::pthread_kill(thread.as_pthread_t(), self.signal) };
    }
}

/// The virtual processor with its memory.
pub(super) struct Vcpu {
    // In this order: the guest goes before the memory that it runs in.
    vcpu: OwnedFd,
    _vm: OwnedFd,
    run: Mapping,
    _memory: Mapping,
    count: u64,
}

impl Vcpu {
    /// Makes a guest that counts down from `count`.
    pub(super) fn new(device: &File, count: u64, stop: Stop) -> io::Result<Self> {
        let device = device.as_raw_fd();
        let vm = owned(call(device, KVM_CREATE_VM, 0)?);
        let memory = Mapping::anonymous(MEMORY_BYTES)?;
        fill(&memory, count);
        let region = MemoryRegion {
            slot: 0,
            flags: 0,
            guest_address: 0,
            bytes: MEMORY_BYTES as u64,
            host_address: memory.start.as_ptr().addr() as u64,
        };
        call_with(vm.as_raw_fd(), KVM_SET_USER_MEMORY_REGION, &region)?;
        let vcpu = owned(call(vm.as_raw_fd(), KVM_CREATE_VCPU, 0)?);
        let run_bytes = usize::try_from(call(device, KVM_GET_VCPU_MMAP_SIZE, 0)?).unwrap_or_default();
        if run_bytes < EXIT_REASON_OFFSET + 4 {
            return Err(io::Error::other("the kernel's description of a run is too small"));
        }
        let run = Mapping::of(&vcpu, run_bytes)?;
        set_registers(vcpu.as_raw_fd())?;
        let blocked = SignalMask { bytes: 8, set: (!(1_u64 << (stop.signal - 1))).to_ne_bytes() };
        call_with(vcpu.as_raw_fd(), KVM_SET_SIGNAL_MASK, &blocked)?;
        Ok(Self { vcpu, _vm: vm, run, _memory: memory, count })
    }

    /// Runs the guest until it halts or is stopped; tells how far it came, and whether it halted.
    pub(super) fn run(&mut self) -> io::Result<(u64, bool)> {
        let finished = match call(self.vcpu.as_raw_fd(), KVM_RUN, 0) {
            Ok(_) => match self.exit_reason() {
                KVM_EXIT_HLT => true,
                reason => return Err(io::Error::other(format!("the guest ended with exit {reason}"))),
            },
            Err(error) if error.kind() == io::ErrorKind::Interrupted => false,
            Err(error) => return Err(error),
        };
        let mut regs = Regs::default();
        call_with_mut(self.vcpu.as_raw_fd(), KVM_GET_REGS, &mut regs)?;
        // A guest that was stopped before its first instruction has not loaded its count yet.
        let started = regs.rip != CODE as u64;
        Ok((if started { self.count.saturating_sub(regs.rcx) } else { 0 }, finished))
    }

    fn exit_reason(&self) -> u32 {
        // SAFETY: the mapping is longer than this, aligned to a page, and no run is under way.
        unsafe { self.run.start.byte_add(EXIT_REASON_OFFSET).cast::<u32>().read_volatile() }
    }
}

/// Puts page tables, descriptors and code into the guest's memory.
fn fill(memory: &Mapping, count: u64) {
    let [top, middle, bottom] = PAGE_TABLES;
    let word = |value: usize| (value as u64).to_le_bytes();
    memory.write(top, &word(middle | PRESENT_WRITABLE));
    memory.write(middle, &word(bottom | PRESENT_WRITABLE));
    memory.write(bottom, &word(PRESENT_WRITABLE_HUGE));
    memory.write(DESCRIPTORS + 8, &CODE_DESCRIPTOR.to_le_bytes());
    memory.write(DESCRIPTORS + 16, &DATA_DESCRIPTOR.to_le_bytes());
    let code = [&MOVE_COUNT[..], &count.to_le_bytes(), &COUNT_DOWN_AND_HALT].concat();
    memory.write(CODE, &code);
}

/// 64-bit mode with paging, at the first instruction.
fn set_registers(vcpu: RawFd) -> io::Result<()> {
    let mut sregs = Sregs::default();
    call_with_mut(vcpu, KVM_GET_SREGS, &mut sregs)?;
    let code = Segment {
        limit: u32::MAX,
        selector: 8,
        kind: 11,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Segment::default()
    };
    let data = Segment { kind: 3, selector: 16, l: 0, db: 1, ..code };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt = Table { base: DESCRIPTORS as u64, limit: 23, padding: [0; 3] };
    sregs.cr0 = 0x8005_0033;
    sregs.cr3 = PAGE_TABLES[0] as u64;
    sregs.cr4 = 0x220;
    sregs.efer = 0x500;
    call_with(vcpu, KVM_SET_SREGS, &sregs)?;
    let regs = Regs { rip: CODE as u64, rflags: 2, rsp: STACK_TOP, ..Regs::default() };
    call_with(vcpu, KVM_SET_REGS, &regs)
}

/// Memory that is unmapped when dropped.
struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

impl Mapping {
    fn anonymous(bytes: usize) -> io::Result<Self> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the place, so no other memory is replaced.
        let start =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, access, MapFlags::PRIVATE) }?;
        Self::at(start, bytes)
    }

    fn of(fd: &OwnedFd, bytes: usize) -> io::Result<Self> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: as above; the kernel writes to it during a run only, when nobody here reads it.
        let start =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, access, MapFlags::SHARED, fd, 0) }?;
        Self::at(start, bytes)
    }

    fn at(start: *mut libc::c_void, bytes: usize) -> io::Result<Self> {
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, bytes })
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.bytes, "inside the guest's memory");
        // SAFETY: checked above to lie in this mapping, which nothing else refers to.
        unsafe { self.start.add(offset).copy_from_nonoverlapping(NonNull::from(bytes).cast(), bytes.len()) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this is the whole mapping, and nothing refers to it any more.
        unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.bytes) }.ok();
    }
}

fn owned(fd: libc::c_int) -> OwnedFd {
    // SAFETY: KVM has just made it, close-on-exec, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn call(fd: RawFd, request: libc::c_ulong, argument: libc::c_ulong) -> io::Result<libc::c_int> {
    // SAFETY: the requests that come here take a number or nothing.
    checked(unsafe { libc::ioctl(fd, request as _, argument) })
}

fn call_with<T>(fd: RawFd, request: libc::c_ulong, argument: &T) -> io::Result<()> {
    // SAFETY: each request is used with the structure that belongs to it, which the kernel only reads.
    checked(unsafe { libc::ioctl(fd, request as _, std::ptr::from_ref(argument)) }).map(drop)
}

fn call_with_mut<T>(fd: RawFd, request: libc::c_ulong, argument: &mut T) -> io::Result<()> {
    // SAFETY: each request is used with the structure that belongs to it, all of whose values are valid.
    checked(unsafe { libc::ioctl(fd, request as _, std::ptr::from_mut(argument)) }).map(drop)
}

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
