"""Functions of `torch.nn.functional` as they are when this package is imported.

The ops call these and not `torch.nn.functional.NAME`, which other code may have replaced by one of the ops.
"""

from torch.nn.functional import adaptive_avg_pool2d as adaptive_avg_pool2d
from torch.nn.functional import adaptive_max_pool2d as adaptive_max_pool2d
from torch.nn.functional import adaptive_max_pool2d_with_indices as adaptive_max_pool2d_with_indices
from torch.nn.functional import avg_pool2d as avg_pool2d
from torch.nn.functional import conv2d as conv2d
from torch.nn.functional import conv_transpose2d as conv_transpose2d
from torch.nn.functional import dropout as dropout
from torch.nn.functional import group_norm as group_norm
from torch.nn.functional import hardtanh as hardtanh
from torch.nn.functional import hardtanh_ as hardtanh_
from torch.nn.functional import instance_norm as instance_norm
from torch.nn.functional import interpolate as interpolate
from torch.nn.functional import layer_norm as layer_norm
from torch.nn.functional import leaky_relu as leaky_relu
from torch.nn.functional import leaky_relu_ as leaky_relu_
from torch.nn.functional import linear as linear
from torch.nn.functional import max_pool2d as max_pool2d
from torch.nn.functional import max_pool2d_with_indices as max_pool2d_with_indices
from torch.nn.functional import normalize as normalize
from torch.nn.functional import pad as pad
from torch.nn.functional import prelu as prelu
from torch.nn.functional import relu as relu
from torch.nn.functional import relu6 as relu6
from torch.nn.functional import scaled_dot_product_attention as scaled_dot_product_attention
from torch.nn.functional import silu as silu
from torch.nn.functional import threshold as threshold
