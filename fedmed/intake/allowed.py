"""Which elements of a DICOM object stay, by keyword. What is not here goes (DICOM PS3.15 Annex E).

Table E.1-1 of the Basic Profile lists what must go and grows every year; a scanner of next year writes what no table
knows yet. So this is the other way round: what fedmed reads of an object, and what other readers need to show it. No
free text is among it but the names of regions that a mask was drawn for.
"""

from __future__ import annotations

MODULES: dict[str, str] = {
    "what it is": """
        SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID FrameOfReferenceUID
        Modality ImageType PresentationIntentType SeriesNumber AcquisitionNumber InstanceNumber ImagesInAcquisition
        StudyDate SeriesDate AcquisitionDate ContentDate AcquisitionDateTime AcquisitionTime ContentTime
        Manufacturer ManufacturerModelName PatientSex PatientAge BurnedInAnnotation RecognizableVisualFeatures
        LossyImageCompression LossyImageCompressionRatio LossyImageCompressionMethod
        ReferencedSOPClassUID ReferencedSOPInstanceUID ReferencedFrameNumber ReferencedImageSequence
        ReferencedInstanceSequence ReferencedSeriesSequence DerivationImageSequence SourceImageSequence
    """,
    "where it is": """
        BodyPartExamined ViewPosition Laterality ImageLaterality FrameLaterality PatientOrientation PatientPosition
        AnatomicRegionSequence AnatomicRegionModifierSequence ViewCodeSequence ViewModifierCodeSequence
        CodeValue LongCodeValue CodingSchemeDesignator CodingSchemeVersion CodeMeaning
        ImagePositionPatient ImageOrientationPatient SliceLocation SliceThickness SpacingBetweenSlices PixelSpacing
        ImagerPixelSpacing NominalScannedPixelSpacing PixelSpacingCalibrationType PixelAspectRatio
        EstimatedRadiographicMagnificationFactor GantryDetectorTilt TableHeight ReconstructionDiameter
        DataCollectionDiameter DistanceSourceToDetector DistanceSourceToPatient PositionerType PositionerPrimaryAngle
        PositionerSecondaryAngle TemporalPositionIdentifier NumberOfTemporalPositions StackID InStackPositionNumber
        TotalPixelMatrixColumns TotalPixelMatrixRows ImagedVolumeWidth ImagedVolumeHeight ImagedVolumeDepth
    """,
    "its pixels": """
        SamplesPerPixel PhotometricInterpretation PlanarConfiguration NumberOfFrames Rows Columns BitsAllocated
        BitsStored HighBit PixelRepresentation PixelPaddingValue PixelPaddingRangeLimit FrameIncrementPointer
        SmallestImagePixelValue LargestImagePixelValue SmallestPixelValueInSeries LargestPixelValueInSeries
        PixelIntensityRelationship PixelIntensityRelationshipSign RescaleIntercept RescaleSlope RescaleType
        WindowCenter WindowWidth VOILUTFunction PresentationLUTShape ModalityLUTSequence VOILUTSequence ModalityLUTType
        LUTDescriptor LUTData RedPaletteColorLookupTableDescriptor GreenPaletteColorLookupTableDescriptor
        BluePaletteColorLookupTableDescriptor AlphaPaletteColorLookupTableDescriptor RedPaletteColorLookupTableData
        GreenPaletteColorLookupTableData BluePaletteColorLookupTableData AlphaPaletteColorLookupTableData
        SegmentedRedPaletteColorLookupTableData SegmentedGreenPaletteColorLookupTableData
        SegmentedBluePaletteColorLookupTableData PaletteColorLookupTableUID ColorSpace
        PixelData FloatPixelData DoubleFloatPixelData ExtendedOffsetTable ExtendedOffsetTableLengths
    """,
    "how it was made": """
        KVP XRayTubeCurrent ExposureTime Exposure ExposureInuAs ConvolutionKernel DetectorType DetectorConfiguration
        Sensitivity RelativeXRayExposure ExposureIndex TargetExposureIndex DeviationIndex BodyPartThickness
        CompressionForce RotationDirection GeneratorPower FocalSpots ScanningSequence SequenceVariant ScanOptions
        MRAcquisitionType SequenceName AngioFlag RepetitionTime EchoTime EchoNumbers EchoTrainLength InversionTime
        TriggerTime NumberOfAverages ImagingFrequency ImagedNucleus MagneticFieldStrength NumberOfPhaseEncodingSteps
        PercentSampling PercentPhaseFieldOfView PixelBandwidth AcquisitionMatrix InPlanePhaseEncodingDirection FlipAngle
        NominalPercentageOfCardiacPhase DiffusionBValue DiffusionGradientOrientation DiffusionDirectionality
        FrameTime FrameTimeVector CineRate FrameReferenceTime ActualFrameDuration Units CountsSource SeriesType
        DecayCorrection DecayFactor DoseCalibrationFactor NumberOfSlices NumberOfTimeSlices ImageIndex
        UltrasoundColorDataPresent SequenceOfUltrasoundRegions RegionSpatialFormat RegionDataType RegionFlags
        RegionLocationMinX0 RegionLocationMinY0 RegionLocationMaxX1 RegionLocationMaxY1 PhysicalUnitsXDirection
        PhysicalUnitsYDirection PhysicalDeltaX PhysicalDeltaY
    """,
    "its frames": """
        SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence DimensionOrganizationSequence
        DimensionOrganizationUID DimensionOrganizationType DimensionIndexSequence DimensionIndexPointer
        FunctionalGroupPointer FrameContentSequence FrameAcquisitionNumber FrameAcquisitionDateTime
        FrameReferenceDateTime FrameAcquisitionDuration TemporalPositionIndex DimensionIndexValues PixelMeasuresSequence
        PlanePositionSequence PlaneOrientationSequence PixelValueTransformationSequence FrameVOILUTSequence
        FrameAnatomySequence CTImageFrameTypeSequence MRImageFrameTypeSequence PETFrameTypeSequence
        XRay3DFrameTypeSequence FrameType PixelPresentation VolumetricProperties VolumeBasedCalculationTechnique
        MREchoSequence EffectiveEchoTime MRDiffusionSequence DiffusionGradientDirectionSequence MRModifierSequence
        InversionTimes MRTimingAndRelatedParametersSequence CardiacSynchronizationSequence
        NominalCardiacTriggerDelayTime CTReconstructionSequence CTXRayDetailsSequence ComplexImageComponent
        AcquisitionContrast UnassignedPerFrameConvertedAttributesSequence UnassignedSharedConvertedAttributesSequence
    """,
    "its regions": """
        SegmentationType SegmentationFractionalType MaximumFractionalValue SegmentsOverlap SegmentSequence SegmentNumber
        SegmentLabel SegmentAlgorithmType SegmentIdentificationSequence ReferencedSegmentNumber
        SegmentedPropertyCategoryCodeSequence SegmentedPropertyTypeCodeSequence RecommendedDisplayCIELabValue
        StructureSetROISequence ROINumber ROIName ReferencedFrameOfReferenceUID ROIContourSequence ReferencedROINumber
        ContourSequence ContourGeometricType ContourNumber NumberOfContourPoints ContourData ContourImageSequence
        ReferencedFrameOfReferenceSequence RTReferencedStudySequence RTReferencedSeriesSequence
    """,
}
ALLOWED = frozenset(" ".join(MODULES.values()).split())

ENUMERATED: dict[str, frozenset[str]] = {  # the standard's own words, which decide how pixels are read
    "Modality": frozenset(
        {
            "AR", "BI", "CR", "CT", "DG", "DX", "ES", "GM", "IO", "IVOCT", "IVUS", "LS", "MG", "MR", "NM", "OCT", "OP",
            "OPT", "OT", "PT", "PX", "RF", "RG", "RTIMAGE", "RTSTRUCT", "SEG", "SM", "TG", "US", "XA", "XC",
        }
    ),
    "PatientSex": frozenset("MFO"),
    "BurnedInAnnotation": frozenset({"YES", "NO"}),
    "RecognizableVisualFeatures": frozenset({"YES", "NO"}),
    "LossyImageCompression": frozenset({"00", "01"}),
    "PresentationIntentType": frozenset({"FOR PRESENTATION", "FOR PROCESSING"}),
    "PhotometricInterpretation": frozenset(
        {
            "MONOCHROME1", "MONOCHROME2", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_420", "YBR_PARTIAL_422",
            "YBR_ICT", "YBR_RCT", "PALETTE COLOR", "HSV", "ARGB", "CMYK", "XYB",
        }
    ),
    "PresentationLUTShape": frozenset({"IDENTITY", "INVERSE", "LIN OD"}),
    "VOILUTFunction": frozenset({"LINEAR", "LINEAR_EXACT", "SIGMOID"}),
    "PixelIntensityRelationship": frozenset({"LIN", "LOG", "DISP"}),
    "RescaleType": frozenset({"OD", "HU", "HU_MOD", "US", "MGML", "Z_EFF", "ED", "EDW", "PCT"}),
    "SegmentationType": frozenset({"BINARY", "FRACTIONAL", "LABELMAP"}),
    "SegmentationFractionalType": frozenset({"PROBABILITY", "OCCUPANCY"}),
    "ContourGeometricType": frozenset(
        {"POINT", "OPEN_PLANAR", "OPEN_NONPLANAR", "CLOSED_PLANAR", "CLOSEDPLANAR_XOR"}
    ),
}  # fmt: skip
SCHEMES = frozenset({"SRT", "SCT", "SNM3", "99SDM", "DCM", "UCUM", "FMA", "LN", "RADLEX", "NCIt", "UMLS"})  # PS3.16 8-1
ORGANS = """
    abdomen adrenal aorta bladder bone bowel brain breast cardiac cervix chest colon duodenum esophagus eye gallbladder
    head heart hip kidney kidneys knee larynx liver lung lungs mandible mediastinum neck oesophagus orbit ovary pancreas
    parotid pelvis pharynx prostate rectum rib shoulder skull spine spleen stomach thorax thymus thyroid trachea uterus
"""
ANATOMY = frozenset(ORGANS.split())  # collections call their patients so too, "PANCREAS_0001"
WORDS = """
    original derived primary secondary axial localizer volume mixed none other reformatted resampled projection average
    addition subtraction division filtered maximum minimum multiplication perfusion diffusion distorted sampled uniform
    irregular magnitude phase real imaginary flow_encoded proton_density velocity angio spectroscopy tomographic
    monochrome color true unknown left right anterior posterior lateral oblique portable standard transverse coronal
    sagittal quantity probability manual automatic semiautomatic
"""
TERMS = ANATOMY | frozenset(WORDS.split())  # PS3.3 C.7.6.1.1.2, C.8.16.1: a name may stand in one, as Mary in PRIMARY
