//! How long work tells what it does and hears that it shall stop.

/// Listens to a pull and may end it.
pub trait Progress: Send + Sync {
    /// A new step of `phase` began; `detail` names what it works on and may be empty.
    fn phase(&self, phase: &str, detail: &str);

    /// Whether the work shall stop; asked several times a second.
    fn cancelled(&self) -> bool;
}

/// Hears nothing and never cancels.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn phase(&self, _phase: &str, _detail: &str) {}

    fn cancelled(&self) -> bool {
        false
    }
}
