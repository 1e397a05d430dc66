from levin.data.combined import CombinedLoader as CombinedLoader
