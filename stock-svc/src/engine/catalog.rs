//! The sales in memory, so that taking permits asks no database. A sale's price, window and limit never change; its
//! verb and stock are hints here, refreshed by the guard: the permits' header decides.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{PoisonError, RwLock},
};

use proto::SaleId;

use crate::store::Record;

#[derive(Debug, Default)]
pub(crate) struct Catalog(RwLock<HashMap<SaleId, Record>>);

impl Catalog {
    pub(crate) fn get(&self, id: &SaleId) -> Option<Record> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    pub(crate) fn live(&self, now: i64) -> Vec<Record> {
        let records = self.0.read().unwrap_or_else(PoisonError::into_inner);
        records.values().filter(|record| record.sale.is_live(now)).cloned().collect()
    }

    /// Takes over a record that was just read or written, unless a later verb is known.
    pub(crate) fn put(&self, record: Record) {
        match self.0.write().unwrap_or_else(PoisonError::into_inner).entry(record.sale.id.clone()) {
            Entry::Occupied(known) if known.get().sale.version > record.sale.version => {}
            Entry::Occupied(mut known) => *known.get_mut() = record,
            Entry::Vacant(empty) => drop(empty.insert(record)),
        }
    }

    /// Forgets what is not live any more.
    pub(crate) fn refresh(&self, live: Vec<Record>) {
        for record in &live {
            self.put(record.clone());
        }
        let live: std::collections::HashSet<_> = live.into_iter().map(|record| record.sale.id).collect();
        self.0.write().unwrap_or_else(PoisonError::into_inner).retain(|id, _| live.contains(id));
    }
}
