//! One member of a tar archive, its header fields and pax records decoded and checked.

use std::collections::BTreeMap;

use tar::{EntryType, Header};

use super::{Meta, Reason};

/// Times further from 1970 than this many seconds (34,000 years) are nonsense.
const FURTHEST_TIME: i64 = 1 << 40;

/// What a member asks to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum MemberKind {
    Directory,
    File,
    HardLink(Vec<u8>),
    Symlink(Vec<u8>),
    Character(u32, u32),
    Block(u32, u32),
    Fifo,
}

/// A decoded member.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    /// As written in the archive, extensions applied.
    pub(crate) path: Vec<u8>,
    pub(crate) kind: MemberKind,
    /// Length of the data that follows in the archive.
    pub(crate) size: u64,
    pub(crate) meta: Meta,
}

/// What the extension headers in front of a member said.
#[derive(Debug, Default)]
pub(crate) struct Extensions {
    pub(crate) long_name: Option<Vec<u8>>,
    pub(crate) long_link: Option<Vec<u8>>,
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    pub(crate) size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<(i64, u32)>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    sparse: bool,
}

impl Extensions {
    /// Takes in the body of a pax header: records of the form `LENGTH KEY=VALUE\n`.
    ///
    /// The length rules, not the newline: values of attributes are binary.
    pub(crate) fn add_pax(&mut self, mut body: &[u8]) -> Result<(), Reason> {
        const BAD: Reason = Reason::Malformed("pax record");
        while !body.is_empty() {
            let space = body.iter().take(20).position(|byte| *byte == b' ').ok_or(BAD)?;
            let length = usize::try_from(decimal(&body[..space]).ok_or(BAD)?).map_err(|_range| BAD)?;
            // The shortest record is `N =` and a newline.
            if length > body.len() || length < space + 3 || body[length - 1] != b'\n' {
                return Err(BAD);
            }
            let record = &body[space + 1..length - 1];
            let equals = record.iter().position(|byte| *byte == b'=').ok_or(BAD)?;
            self.add_record(&record[..equals], &record[equals + 1..])?;
            body = &body[length..];
        }
        Ok(())
    }

    fn add_record(&mut self, key: &[u8], value: &[u8]) -> Result<(), Reason> {
        let number = |field| decimal(value).ok_or(Reason::Malformed(field));
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = Some(number("pax size")?),
            b"uid" => self.uid = Some(number("pax uid")?),
            b"gid" => self.gid = Some(number("pax gid")?),
            b"mtime" => self.mtime = Some(pax_time(value)?),
            _ if key.starts_with(b"GNU.sparse.") => self.sparse = true,
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.add_xattr(name, value)?;
                }
            }
        }
        Ok(())
    }

    fn add_xattr(&mut self, name: &[u8], value: &[u8]) -> Result<(), Reason> {
        // Overlay bookkeeping of the machine that made the layer would steer the guest's overlay.
        if name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.") {
            return Ok(());
        }
        let (_, rest) = crate::erofs::xattr_index(name).ok_or(Reason::XattrNamespace)?;
        if rest.contains(&0) {
            return Err(Reason::Nul);
        }
        if rest.len() > 255 || value.len() > usize::from(u16::MAX) {
            return Err(Reason::Xattrs);
        }
        self.xattrs.insert(name.to_vec(), value.to_vec());
        Ok(())
    }

    /// Joins a header with its extensions.
    pub(crate) fn finish(self, header: &Header) -> Result<Member, (Vec<u8>, Reason)> {
        let path = match (&self.path, &self.long_name) {
            (Some(path), _) | (None, Some(path)) => path.clone(),
            (None, None) => header.path_bytes().into_owned(),
        };
        match self.decode(header, &path) {
            Ok((kind, size, meta)) => Ok(Member { path, kind, size, meta }),
            Err(reason) => Err((path, reason)),
        }
    }

    fn decode(self, header: &Header, path: &[u8]) -> Result<(MemberKind, u64, Meta), Reason> {
        if self.sparse {
            return Err(Reason::Sparse);
        }
        let stated = match self.size {
            Some(size) => size,
            None => header.entry_size().map_err(|_bad| Reason::Malformed("size"))?,
        };
        let link = match (self.link, self.long_link) {
            (Some(link), _) | (None, Some(link)) => link,
            (None, None) => header.link_name_bytes().map(std::borrow::Cow::into_owned).unwrap_or_default(),
        };
        let device = || -> Result<(u32, u32), Reason> {
            let part = |value: std::io::Result<Option<u32>>| value.ok().flatten().ok_or(Reason::Device);
            let (major, minor) = (part(header.device_major())?, part(header.device_minor())?);
            // The kernel's own bounds: 12 and 20 bits.
            if major >= 1 << 12 || minor >= 1 << 20 { Err(Reason::Device) } else { Ok((major, minor)) }
        };
        let kind = match header.entry_type() {
            EntryType::Regular | EntryType::Continuous if path.ends_with(b"/") && stated == 0 => {
                MemberKind::Directory
            }
            EntryType::Regular | EntryType::Continuous => MemberKind::File,
            EntryType::Directory => MemberKind::Directory,
            EntryType::Link => MemberKind::HardLink(link),
            EntryType::Symlink => MemberKind::Symlink(link),
            EntryType::Char => {
                let (major, minor) = device()?;
                // Overlayfs reads a character device 0:0 as a whiteout.
                if (major, minor) == (0, 0) {
                    return Err(Reason::Device);
                }
                MemberKind::Character(major, minor)
            }
            EntryType::Block => {
                let (major, minor) = device()?;
                MemberKind::Block(major, minor)
            }
            EntryType::Fifo => MemberKind::Fifo,
            EntryType::GNUSparse => return Err(Reason::Sparse),
            _ => return Err(Reason::Type),
        };
        let size = match kind {
            MemberKind::File => stated,
            // Some archivers repeat the file's size on a hard link that carries no data; no reader agrees
            // with another there, so only the unambiguous form is accepted.
            _ if stated != 0 => return Err(Reason::Malformed("size")),
            _ => 0,
        };
        Ok((kind, size, meta(header, self.uid, self.gid, self.mtime, self.xattrs)?))
    }
}

fn meta(
    header: &Header,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<(i64, u32)>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
) -> Result<Meta, Reason> {
    let owner = |pax: Option<u64>, own: std::io::Result<u64>| {
        let id = match pax {
            Some(id) => id,
            None => own.map_err(|_bad| Reason::Malformed("owner"))?,
        };
        // 2^32 - 1 means "no change" to the kernel and can own nothing.
        u32::try_from(id).ok().filter(|id| *id != u32::MAX).ok_or(Reason::Owner)
    };
    let (mtime, mtime_nsec) = match mtime {
        Some(time) => time,
        // A negative time in base 256 arrives here as its two's complement.
        None => (header.mtime().map_err(|_bad| Reason::Malformed("mtime"))?.cast_signed(), 0),
    };
    if !(-FURTHEST_TIME..=FURTHEST_TIME).contains(&mtime) {
        return Err(Reason::Time);
    }
    let mode = header.mode().map_err(|_bad| Reason::Malformed("mode"))? & 0o7777;
    Ok(Meta {
        mode: u16::try_from(mode).map_err(|_range| Reason::Malformed("mode"))?,
        uid: owner(uid, header.uid())?,
        gid: owner(gid, header.gid())?,
        mtime,
        mtime_nsec,
        xattrs,
    })
}

fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// `-12.25` → (-13, 750,000,000): the fraction always counts forward.
fn pax_time(text: &[u8]) -> Result<(i64, u32), Reason> {
    const BAD: Reason = Reason::Malformed("pax mtime");
    let (negative, digits) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let dot = digits.iter().position(|byte| *byte == b'.').unwrap_or(digits.len());
    let whole = decimal(&digits[..dot]).ok_or(BAD)?;
    let whole = i64::try_from(whole).ok().filter(|whole| *whole <= FURTHEST_TIME).ok_or(Reason::Time)?;
    let mut nanoseconds = 0;
    let mut unit = 100_000_000;
    for digit in digits.get(dot + 1..).unwrap_or_default() {
        if !digit.is_ascii_digit() {
            return Err(BAD);
        }
        nanoseconds += u32::from(digit - b'0') * unit;
        unit /= 10;
    }
    Ok(match (negative, nanoseconds) {
        (false, _) => (whole, nanoseconds),
        (true, 0) => (-whole, 0),
        (true, _) => (-whole - 1, 1_000_000_000 - nanoseconds),
    })
}
