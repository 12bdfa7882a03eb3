//! The rate of the time-stamp counter.

#![expect(unsafe_code, reason = "the instructions that read the counter and its description")]

use std::time::Duration;

/// How far apart the two readings are: at 10 ms, the 100 ns that a reading may be off are 10 ppm.
const APART: Duration = Duration::from_millis(10);
/// Readings of clock and counter together, of which the quickest is the truest.
const READINGS: u32 = 50;
/// What a real counter runs at.
const PLAUSIBLE_KHZ: std::ops::RangeInclusive<u64> = 100_000..=20_000_000;

/// Measures the rate of this host's TSC in kHz, in about 10 ms.
///
/// None when the processor does not promise a constant rate, or on another architecture than x86-64.
pub fn measure_tsc_khz() -> Option<u32> {
    if !is_invariant() {
        return None;
    }
    let (ticks_before, nanos_before) = read_together();
    std::thread::sleep(APART);
    let (ticks_after, nanos_after) = read_together();
    let ticks = u128::from(ticks_after.checked_sub(ticks_before)?);
    let nanos = u128::from(nanos_after.checked_sub(nanos_before)?);
    let khz = u64::try_from((ticks * 1_000_000).checked_div(nanos)?).ok()?;
    if !PLAUSIBLE_KHZ.contains(&khz) {
        return None;
    }
    u32::try_from(khz).ok()
}

/// The counter and the clock at one moment. The clock is read between two readings of the counter; of several
/// such triples the closest is taken, so that being preempted within one does no harm.
fn read_together() -> (u64, u64) {
    (0..READINGS)
        .map(|_| {
            let before = read_counter();
            let nanos = read_clock();
            let width = read_counter().saturating_sub(before);
            (width, before + width / 2, nanos)
        })
        .min()
        .map(|(_, ticks, nanos)| (ticks, nanos))
        .unwrap_or_default()
}

/// The raw clock is not slewed by NTP: the guest is to know the counter's rate, not the wall's.
fn read_clock() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::MonotonicRaw);
    let (seconds, nanos) = (now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs());
    seconds * 1_000_000_000 + nanos
}

#[cfg(target_arch = "x86_64")]
fn read_counter() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and it touches no memory.
    unsafe { std::arch::x86_64::_rdtsc() }
}

#[cfg(target_arch = "x86_64")]
fn is_invariant() -> bool {
    use std::arch::x86_64::__cpuid;

    const POWER_MANAGEMENT: u32 = 0x8000_0007;
    const INVARIANT_TSC: u32 = 1 << 8;
    __cpuid(0x8000_0000).eax >= POWER_MANAGEMENT && __cpuid(POWER_MANAGEMENT).edx & INVARIANT_TSC != 0
}

#[cfg(not(target_arch = "x86_64"))]
fn read_counter() -> u64 {
    0
}

#[cfg(not(target_arch = "x86_64"))]
fn is_invariant() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measurements_agree_with_each_other() {
        if !is_invariant() {
            println!("skipped: measurements_agree_with_each_other: no invariant TSC");
            return;
        }
        let rates: Vec<u32> = (0..5).map(|_| measure_tsc_khz().expect("a rate")).collect();
        let (min, max) = (rates.iter().min().expect("five"), rates.iter().max().expect("five"));
        assert!(f64::from(max - min) < f64::from(*max) * 0.001, "{rates:?} differ by more than 0.1 %");
    }
}
