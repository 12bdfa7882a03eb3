//! The second pass: the contents of the files that survived the merge, in archive order.

use std::collections::HashMap;

use super::archive::Archive;
use super::{Kind, Layer, Limits, NodeId, Reached, Reason, Tree, TreeError, show};

/// A function that fills a buffer from the current file and says how much it wrote; 0 at the end.
pub(crate) type Source<'a> = dyn FnMut(&mut [u8]) -> Result<usize, TreeError> + 'a;

/// Calls `sink` once for every file of `inodes` that is not empty, with its size and its bytes.
///
/// The order is that of the layers, so it does not depend on anything but the layers.
pub(crate) fn stream_files(
    tree: &Tree,
    inodes: &[Reached],
    layers: &[Layer],
    limits: &Limits,
    interrupted: &dyn Fn() -> bool,
    sink: &mut dyn FnMut(NodeId, u64, &mut Source<'_>) -> Result<(), TreeError>,
) -> Result<(), TreeError> {
    let mut wanted: Vec<HashMap<u32, (NodeId, u64)>> = vec![HashMap::new(); layers.len()];
    for reached in inodes {
        if let Kind::File { size, layer, member } = tree.node(reached.node).kind
            && size > 0
            && let Some(of_layer) = wanted.get_mut(layer as usize)
        {
            of_layer.insert(member, (reached.node, size));
        }
    }
    for (number, (layer, mut wanted)) in layers.iter().zip(wanted).enumerate() {
        let reader = layer.open().map_err(|source| TreeError::Read { layer: number, source })?;
        let mut archive = Archive::new(reader, number, limits, interrupted);
        let mut index = 0;
        while !wanted.is_empty() {
            let changed =
                |path: &[u8]| TreeError::Member { layer: number, path: show(path), reason: Reason::Changed };
            let Some(member) = archive.next_member()? else { return Err(changed(&[])) };
            if let Some((node, size)) = wanted.remove(&index) {
                if member.size != size {
                    return Err(changed(&member.path));
                }
                sink(node, size, &mut |buffer| archive.read_data(buffer))?;
            }
            index += 1;
        }
    }
    Ok(())
}
