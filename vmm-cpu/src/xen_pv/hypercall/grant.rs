//! `grant_table_op`: what a guest grants to others, in version 1. It cannot map grants of others.

use super::super::abi::errno::Errno;
use super::super::abi::grant::{
    COPY_DEST_GREF, COPY_SOURCE_GREF, GetVersion, GrantCopy, MapGrantRef, QuerySize, SetupTable,
    SwapGrantRef, UnmapGrantRef, gntst, gnttabop,
};
use super::super::abi::{PAGE_BYTES, PAGE_SIZE, domid, nr};
use super::super::memory::element;
use super::{Call, Done, Failure, Outcome};

impl Call<'_> {
    /// Arguments: command, list, count.
    pub(super) fn grant_table_op(&mut self, args: &mut [u64; 6]) -> Outcome {
        let [command, list, count, ..] = *args;
        let count = count & u64::from(u32::MAX);
        // As in Xen: the count is a signed int.
        if count >= 1 << 31 {
            return Err(Errno::EINVAL.into());
        }
        match command {
            gnttabop::SETUP_TABLE => {
                if count != 1 {
                    return Err(Errno::EINVAL.into());
                }
                self.setup_table(list)
            }
            gnttabop::QUERY_SIZE => {
                if count != 1 {
                    return Err(Errno::EINVAL.into());
                }
                let mut request: QuerySize = self.space().read(list)?;
                let (_, max) = self.domain.memory.grant_frames();
                request.status = if request.dom == domid::SELF { gntst::OKAY } else { gntst::BAD_DOMAIN };
                request.nr_frames = self.domain.grants.frames();
                request.max_nr_frames = u32::try_from(max).unwrap_or(u32::MAX);
                self.space().write(list, &request)?;
                Ok(Done::OK)
            }
            gnttabop::GET_VERSION => {
                let mut request: GetVersion = self.space().read(list)?;
                if request.dom != domid::SELF {
                    return Err(Errno::ESRCH.into());
                }
                request.version = 1;
                self.space().write(list, &request)?;
                Ok(Done::OK)
            }
            gnttabop::SET_VERSION => {
                let version: u32 = self.space().read(list)?;
                if version == 1 { Ok(Done::OK) } else { self.unknown(nr::GRANT_TABLE_OP) }
            }
            gnttabop::MAP_GRANT_REF => self.each(args, |_, mut request: MapGrantRef| {
                // There is nobody whose grants could be mapped.
                request.status = gntst::BAD_DOMAIN;
                request
            }),
            gnttabop::UNMAP_GRANT_REF | gnttabop::UNMAP_AND_REPLACE => {
                self.each(args, |_, mut request: UnmapGrantRef| {
                    request.status = gntst::BAD_HANDLE;
                    request
                })
            }
            gnttabop::COPY => self.each(args, |call, mut request: GrantCopy| {
                request.status = call.grant_copy(&request);
                request
            }),
            gnttabop::SWAP_GRANT_REF => self.each(args, |call, mut request: SwapGrantRef| {
                let swapped = call.domain.grants.swap(&call.domain.memory, request.ref_a, request.ref_b);
                request.status = swapped.err().unwrap_or(gntst::OKAY);
                request
            }),
            _ => self.unknown(nr::GRANT_TABLE_OP),
        }
    }

    /// Goes through a list, each element of which takes its own answer.
    fn each<T>(&mut self, args: &mut [u64; 6], mut f: impl FnMut(&mut Self, T) -> T) -> Outcome
    where
        T: zerocopy::FromBytes + zerocopy::IntoBytes + zerocopy::Immutable,
    {
        let [_, list, count, ..] = *args;
        let count = count & u64::from(u32::MAX);
        for index in 0..count {
            let at = element::<T>(list, index)?;
            if !self.step() {
                [args[1], args[2]] = [at, count - index];
                return Ok(Done::Again);
            }
            let request = self.space().read(at)?;
            let answer = f(self, request);
            self.space().write(at, &answer).map_err(Failure::from)?;
        }
        Ok(Done::OK)
    }

    fn setup_table(&mut self, at: u64) -> Outcome {
        let mut request: SetupTable = self.space().read(at)?;
        let (first, max) = self.domain.memory.grant_frames();
        request.status = if request.dom != domid::SELF {
            gntst::BAD_DOMAIN
        } else if u64::from(request.nr_frames) > max {
            gntst::GENERAL_ERROR
        } else {
            self.domain.grants.grow(request.nr_frames);
            for index in 0..u64::from(request.nr_frames) {
                self.space().write(element::<u64>(request.frame_list, index)?, &(first + index))?;
            }
            gntst::OKAY
        };
        self.space().write(at, &request)?;
        Ok(Done::OK)
    }

    /// Copies within the domain. Grant references of its own count as those of any other would.
    fn grant_copy(&mut self, request: &GrantCopy) -> i16 {
        let len = u64::from(request.len);
        let ends = [
            (&request.source, request.flags & COPY_SOURCE_GREF != 0),
            (&request.dest, request.flags & COPY_DEST_GREF != 0),
        ];
        for (end, _) in ends {
            if u64::from(end.offset) + len > PAGE_SIZE {
                return gntst::BAD_COPY_ARG;
            }
        }
        let [source, dest] = ends.map(|(end, is_reference)| {
            if end.domid != domid::SELF {
                return Err(gntst::BAD_DOMAIN);
            }
            // A domain does not grant to itself.
            if is_reference {
                return Err(gntst::PERMISSION_DENIED);
            }
            if !self.domain.memory.is_ram(end.place) {
                return Err(gntst::BAD_PAGE);
            }
            Ok(end.place * PAGE_SIZE + u64::from(end.offset))
        });
        let (source, dest) = match (source, dest) {
            (Ok(source), Ok(dest)) => (source, dest),
            (Err(status), _) | (_, Err(status)) => return status,
        };
        if self.domain.tables.level(dest / PAGE_SIZE) != 0 {
            return gntst::BAD_PAGE;
        }
        let mut data = [0; PAGE_BYTES];
        let part = data.get_mut(..usize::from(request.len)).unwrap_or_default();
        let memory = &self.domain.memory;
        match memory.read(source, part).and_then(|()| memory.write(dest, part)) {
            Ok(()) => gntst::OKAY,
            Err(_) => gntst::BAD_PAGE,
        }
    }
}

#[cfg(test)]
mod tests;
