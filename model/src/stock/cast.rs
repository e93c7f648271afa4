//! Who takes part: orders, their buyers, and the exchanges that change nothing but names.

use proto::{BuyerId, OrderId, RequestId, SaleId};
use stock_svc::domain::{
    HoldId,
    ledger::Hold,
    permits::{Held, Refund, Release, Return},
};

/// One order.
#[derive(Clone, Debug)]
pub struct Order {
    /// Its hold.
    pub hold: HoldId,
    /// By whom.
    pub buyer: BuyerId,
    /// How many units.
    pub quantity: i64,
}

/// Everybody.
#[derive(Clone, Debug)]
pub struct Cast {
    /// The sale.
    pub sale: SaleId,
    /// All orders.
    pub orders: Vec<Order>,
    /// Ways to exchange orders without changing who buys what: where each order goes. The first leaves all in place.
    pub swaps: Vec<Vec<usize>>,
}

impl Cast {
    /// Buyers with orders of these quantities. Buyers who want the same are exchangeable, and so are one buyer's orders
    /// of the same quantity.
    pub fn new(buyers: &[Vec<i64>]) -> Self {
        let mut orders = Vec::new();
        let mut whose = Vec::new();
        for (index, quantities) in buyers.iter().enumerate() {
            let buyer = BuyerId::parse(&format!("buyer-{index}")).expect("a buyer's name");
            for quantity in quantities {
                let text = format!("{:032x}", orders.len() + 1);
                let request = RequestId::parse("request", &text).expect("a request's id");
                let hold = OrderId::derive(&buyer, &request);
                orders.push(Order { hold, buyer: buyer.clone(), quantity: *quantity });
                whose.push(index);
            }
        }
        let fits = |swap: &[usize]| {
            let same_quantity = |i: usize| orders[i].quantity == orders[swap[i]].quantity;
            let same_buyers = |i: usize, j: usize| (whose[i] == whose[j]) == (whose[swap[i]] == whose[swap[j]]);
            (0..swap.len()).all(same_quantity) && (0..swap.len()).all(|i| (0..swap.len()).all(|j| same_buyers(i, j)))
        };
        let mut swaps: Vec<Vec<usize>> = permutations(orders.len()).into_iter().filter(|swap| fits(swap)).collect();
        swaps.sort();
        Self { sale: SaleId::parse("sale", "model").expect("a sale's id"), orders, swaps }
    }

    /// Which order this hold is.
    pub fn index_of(&self, hold: HoldId) -> usize {
        self.orders.iter().position(|order| order.hold == hold).expect("only these orders have holds")
    }

    fn hold(&self, swap: usize, hold: HoldId) -> &Order {
        &self.orders[self.swaps[swap][self.index_of(hold)]]
    }

    /// A refund, after an exchange.
    pub fn refund(&self, swap: usize, refund: &Refund) -> Refund {
        match refund {
            Refund::Release(release) => {
                let Order { hold, buyer, .. } = self.hold(swap, release.hold).clone();
                Refund::Release(Release { hold, buyer: release.buyer.as_ref().map(|_| buyer), ..release.clone() })
            }
            Refund::Return(returned) => {
                Refund::Return(Return { hold: self.hold(swap, returned.hold).hold, epoch: returned.epoch })
            }
        }
    }

    /// Holds of a snapshot, after an exchange.
    pub fn held(&self, swap: usize, held: &[Held]) -> Vec<Held> {
        let mut held: Vec<Held> = held
            .iter()
            .map(|held| {
                let Order { hold, buyer, .. } = self.hold(swap, held.hold).clone();
                let mut grant = held.grant.clone();
                grant.buyer = buyer;
                Held { hold, grant }
            })
            .collect();
        held.sort_by_key(|held| held.hold);
        held
    }

    /// A row, after an exchange.
    pub fn row(&self, swap: usize, id: HoldId, row: &Hold) -> (HoldId, Hold) {
        let Order { hold, buyer, .. } = self.hold(swap, id).clone();
        (hold, Hold { order: hold, buyer, ..row.clone() })
    }

    /// A set of orders, after an exchange.
    pub fn mask(&self, swap: usize, mask: u8) -> u8 {
        (0..self.orders.len()).filter(|i| mask & (1 << i) != 0).fold(0, |to, i| to | 1 << self.swaps[swap][i])
    }
}

fn permutations(count: usize) -> Vec<Vec<usize>> {
    if count == 0 {
        return vec![Vec::new()];
    }
    let mut all = Vec::new();
    for shorter in permutations(count - 1) {
        for place in 0..count {
            let mut longer = shorter.clone();
            longer.insert(place, count - 1);
            all.push(longer);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_wants_the_same_is_exchangeable() {
        assert_eq!(Cast::new(&[vec![1], vec![1], vec![1]]).swaps.len(), 6);
        assert_eq!(Cast::new(&[vec![1], vec![2]]).swaps.len(), 1);
        assert_eq!(Cast::new(&[vec![1, 1], vec![1]]).swaps.len(), 2);
        assert_eq!(Cast::new(&[vec![1, 1], vec![1, 1]]).swaps.len(), 8);
        assert_eq!(Cast::new(&[vec![1], vec![1], vec![1]]).swaps[0], [0, 1, 2]);
    }
}
